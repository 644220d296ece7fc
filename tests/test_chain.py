"""The headless chain: what it makes, and what it takes as made."""

import run_chain


def test_a_cache_that_is_there_is_verified_and_used(monkeypatch, tmp_path):
    """On a node without internet `make race` must not ask the hub for a cache made before."""
    commands, notebooks = [], []
    monkeypatch.setattr(run_chain, "ROOT", tmp_path)
    monkeypatch.setattr(run_chain, "generate_race_cache", lambda arguments: commands.append(arguments) or 0)
    monkeypatch.setattr(run_chain, "run_notebook", lambda name, parameters: notebooks.append((name, parameters)))
    (tmp_path / "runs" / "race").mkdir(parents=True)
    (tmp_path / "runs" / "race" / "results.csv").write_text("stage\n")
    assert run_chain.main(["race"]) == 0
    (tmp_path / "cache" / "race").mkdir(parents=True)
    (tmp_path / "cache" / "race" / "manifest.json").write_text("{}")
    assert run_chain.main(["race", "--limit-questions", "9"]) == 0
    assert commands[0][-4:] == ["--source", "ehovy/race", "--model", "albert-base-v2"]
    assert commands[1] == ["--verify", str(tmp_path / "cache" / "race")]
    assert [name for name, _ in notebooks[:5]] == list(run_chain.NOTEBOOKS)
    assert "LEARNING_RATE" not in notebooks[0][1] and notebooks[5][1]["LIMIT_QUESTIONS"] == 9


def test_a_cache_that_fails_ends_the_chain(monkeypatch, tmp_path):
    monkeypatch.setattr(run_chain, "ROOT", tmp_path)
    monkeypatch.setattr(run_chain, "generate_race_cache", lambda _: 1)
    monkeypatch.setattr(run_chain, "run_notebook", lambda *_: (_ for _ in ()).throw(AssertionError))
    assert run_chain.main(["demo"]) == 1
