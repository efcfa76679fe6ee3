"""Progress where there is no terminal."""

from examples.derprop_voc import progress


def test_progress_in_a_file_is_a_line_at_a_time(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.make_bar(3, "steps", initial=1) as bar:
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["steps: 1 of 3", "steps: 2 of 3", "steps: 3 of 3"]
    assert lines[1].endswith("loss=0.5")
    monkeypatch.setattr(progress, "EVERY", 10)
    with progress.make_bar(3, "steps", leave=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""  # done in less than ten seconds
    monkeypatch.setattr(progress, "EVERY", 0)
    progress.make_bar(3, "steps", progress=False).update()
    assert capsys.readouterr().err == ""
