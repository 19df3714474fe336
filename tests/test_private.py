"""What this project takes of other packages without their having promised it.

Each test says which upgrade broke what.
"""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from blip_jax import checkpoint, trees
from blip_jax.data.text import wordpiece
from blip_jax.parallel import processes


def test_jaxs_detectors_of_clusters_answer_what_is_asked():
    found = processes.known_to_jax()
    assert list(found) == ["slurm", "gke", "gce"]
    for kind in found.values():
        for name in ("is_env_present", "get_process_count", "get_process_id", "get_local_process_id"):
            assert not inspect.signature(getattr(kind, name)).parameters, f"{kind.__name__}.{name} takes arguments now"
        asked = list(inspect.signature(kind.get_coordinator_address).parameters)
        assert len(asked) == 2 and asked[0] == "timeout_secs", (
            f"{kind.__name__}.get_coordinator_address is called otherwise now"
        )


def test_tensorstores_description_of_a_checkpoint_names_every_file_of_it(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = {
        f"kernel_{i}": jax.device_put(jnp.full((64, 1024), float(i)), NamedSharding(mesh, P("data"))) for i in range(3)
    }
    with checkpoint.open_dir(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 3, state, {"step": 3}, {})
    folder = checkpoint.newest(tmp_path) / "state"

    data = sorted(path for path in folder.rglob("*") if path.parent.name == "d" and path.parent.parent == folder)
    assert data and not checkpoint.missing(folder.parent)
    for path in data:
        kept = path.read_bytes()
        path.write_bytes(kept[:-1])  # the last byte of every file is referred to
        assert checkpoint.missing(folder.parent) == [f"state/d/{path.name}"]
        path.write_bytes(kept)


def test_orbax_writes_arrays_one_after_the_other_where_it_is_told_to(tmp_path):
    seen = []

    def array(value):
        def read():
            seen.append(len(list(tmp_path.rglob(".zarray"))))
            return np.full((4, 3), value, np.float32)

        return trees.Lazy((4, 3), np.float32, read)

    state = {"params": {f"x{i}": array(i) for i in range(4)}, "frozen": {}, "extra": None}
    checkpoint.write(tmp_path, state, {"step": 0}, {})
    # once for their checksums, and once when it is their turn, with the files of those before there already
    assert seen[:4] == [0] * 4 and seen[4:] == [0, 1, 2, 3], "orbax collects arrays, or does not ask its handler"
    got = checkpoint.load_params(tmp_path)
    assert [float(got[f"x{i}"].sum()) for i in range(4)] == [0, 12, 24, 36]


@pytest.mark.parametrize(
    "node, expected",
    [
        ("{'root': {'location': 'btreenode::d/0a:7:20'}}", [("btreenode", "", "d/0a", 7, 20)]),
        (
            {"entries": [{"value": "value:p_0/:d/0b:0:9"}, {"value": "versionnode::d/0c:1:2"}]},
            [("value", "p_0/", "d/0b", 0, 9), ("versionnode", "", "d/0c", 1, 2)],
        ),
        ({"entries": [{"inline": "no reference"}]}, []),
    ],
)
def test_references_of_a_node(node, expected):
    assert checkpoint.references(node) == expected


def test_a_thread_that_aborts_leaves_time_to_choose_the_exit_status():
    program = (
        "import ctypes, os, threading, time\nfrom blip_jax.parallel import peers\npeers.hold_aborts()\n"
        "begun = threading.Event()\n"
        "def abort():\n    begun.set()\n    ctypes.CDLL(None).abort()\n"
        "threading.Thread(target=abort, daemon=True).start()\nbegun.wait()\ntime.sleep(0.5)\n"
        "print('still here', flush=True)\nos._exit(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "still here\n"), "C's sleep() holds an abort no longer"


def test_the_librarys_bert_tokenizer_is_taken_out_whole(tiny_vocab):
    vocab = {token: i for i, token in enumerate(tiny_vocab.read_text().splitlines())}
    library = BertWordPieceTokenizer(vocab, lowercase=True)
    ours = wordpiece.Tokenizer(tiny_vocab)
    assert isinstance(ours.lengths(["a"], 9)[0].item(), int) and isinstance(
        Tokenizer.from_str(library.to_str()), Tokenizer
    )
    for caption in ("A red Circle, left of a blue square!", "Café déjà vu", "中文 and 𝒳", "[SEP] unknownword", ""):
        ids, mask = ours.encode([caption], 30)
        if "[SEP]" not in caption:  # which the library takes for the token, and we for text
            assert ids[0, : mask.sum()].tolist() == library.encode(caption).ids
