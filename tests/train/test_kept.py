"""What runs of one process with the same settings share: everything that the settings decide, and nothing else."""

from blip_jax.train import kept


def test_the_same_settings_give_the_same_thing_wherever_data_and_checkpoints_are(tiny_cfg, monkeypatch):
    monkeypatch.setattr(kept, "_kept", {})
    made = []
    of = lambda cfg, *what: kept.of(cfg, lambda settings: made.append(settings) or len(made), *what)
    assert of(tiny_cfg, "step", 3) == of(tiny_cfg, "step", 3) == 1
    other = tiny_cfg.copy_and_resolve_references()
    with other.data.unlocked():
        del other.data.train["world"]
    other.train.save_every, other.train.init_from, other.eval.k = 1, "elsewhere", 2
    assert of(other, "step", 3) == 1
    assert "data" in tiny_cfg and "save_every" in tiny_cfg.train  # taken out of a copy
    assert of(tiny_cfg, "step", 4) == 2 and of(tiny_cfg, "shapes", 3) == 3
    for number, (path, value) in enumerate({"train.steps": 7, "model.dropout": 0.3, "seed": 5, "mesh.fsdp": 2}.items()):
        other = tiny_cfg.copy_and_resolve_references()
        other.update_from_flattened_dict({path: value})
        assert of(other, "step", 3) == 4 + number
    assert not any("data" in settings or "save_every" in settings.train for settings in made)


def test_those_asked_for_last_are_kept(tiny_cfg, monkeypatch):
    monkeypatch.setattr(kept, "_kept", {})
    of = lambda number, value: kept.of(tiny_cfg, lambda _: value, number)
    assert [of(n, n) for n in range(kept.MOST)] == list(range(kept.MOST))
    assert of(0, "new") == 0 and of("one more", 1) == 1
    assert of(0, "new") == 0 and of(1, "new") == "new"
