"""Evaluations of every task give the same on two processes as on one: predictions, numbers, and which checkpoint of a
run is the best.
"""

import json

import numpy as np
import pytest
from world import mini
from world.processes import Pod, Server
from world.runs import begun, leaves, write_config

from blip_jax.tasks import caption
from blip_jax.train import best, evaluation, loop


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def test_two_processes_evaluate_as_one(tiny_cfg, server, tmp_path, monkeypatch):
    monkeypatch.setattr(caption, "evaluate", caption.curve)  # official scores need Java, which takes 13 s to start
    pictures, cases, configs = mini.write(tmp_path / "mini"), {}, {}
    for objective in mini.SOURCES:
        cfg = mini.settings(tiny_cfg.copy_and_resolve_references(), objective, pictures)
        configs[objective] = write_config(cfg, tmp_path / f"{objective}.py")
        cases[objective] = cfg
    origins = {name: begun(cfg, tmp_path / "begun" / name) for name, cfg in cases.items() if name != "caption"}
    for objective, trained in (("video_retrieval", "retrieval"), ("video_qa", "vqa")):
        cases[objective] = mini.evaluation_of(tiny_cfg.copy_and_resolve_references(), objective)
        configs[objective] = write_config(cases[objective], tmp_path / f"{objective}.py")
        origins[objective] = origins[trained]

    pod = Pod(
        server,
        tmp_path,
        2,
        4,
        [
            "evaluate_all",
            [str(configs["caption"]), str(tmp_path / "two" / "run")],
            [
                [str(path), str(tmp_path / "two" / name), str(origins.get(name, tmp_path / "two" / "run" / "best"))]
                for name, path in configs.items()
            ],
        ],
    )
    loop.fit(cases["caption"], tmp_path / "one" / "run")
    for name, cfg in cases.items():
        evaluation.evaluate(cfg, tmp_path / "one" / name, origins.get(name, tmp_path / "one" / "run" / "best"))
    assert pod.ends() == [0, 0], pod.text(0) + pod.text(1)

    one, two = (best.found(tmp_path / which / "run") for which in ("one", "two"))
    assert one.step == two.step and one.score == pytest.approx(two.score, abs=1e-5)
    assert leaves(tmp_path / "two" / "run" / "best").keys() == leaves(tmp_path / "one" / "run" / "best").keys()
    for name in cases:
        found = []
        for which in ("one", "two"):
            files = {path.name: json.loads(path.read_text()) for path in (tmp_path / which / name).glob("*.json")}
            del files["evaluation.json"]["checkpoint"]
            found.append(files)
        assert found[0].keys() == found[1].keys(), name
        assert found[0].pop("evaluation.json") == pytest.approx(found[1].pop("evaluation.json"), abs=1e-5), name
        assert found[0] == found[1], name  # predictions, and what servers take
        scores = [tmp_path / which / name / "scores.npz" for which in ("one", "two")]
        assert scores[0].exists() == scores[1].exists() == ("retrieval" in name)
        if "retrieval" in name:
            one, two = map(np.load, scores)
            assert one.keys() == two.keys()
            for part in one:
                np.testing.assert_allclose(one[part], two[part], atol=1e-5, err_msg=f"{name}, {part}")
