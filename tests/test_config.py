from dataclasses import dataclass
from pathlib import Path

import pytest

from config import UserError, flag, from_cli, make_folder, run, words


@dataclass(frozen=True)
class Example:
    """An example command."""

    data: Path = flag(help="a required folder")
    lr: float = flag(1e-4, help="a rate, 50% of it")
    layers: str | None = flag(None, help="an optional text")
    resume: bool = flag(False, help="a switch")


def test_each_field_becomes_a_flag_of_its_type():
    cfg = from_cli(Example, ["--data", "x/y", "--lr", "0.5", "--layers", "6,7", "--resume"])
    assert cfg == Example(Path("x/y"), 0.5, "6,7", True)


def test_defaults_of_the_dataclass_are_defaults_of_the_command_line():
    assert from_cli(Example, ["--data", "x"]) == Example(Path("x"))


def test_the_word_none_means_none_for_an_optional_field():
    assert from_cli(Example, ["--data", "x", "--layers", "none"]).layers is None


@pytest.mark.parametrize("argv", [[], ["--data", "x", "--lr", "fast"], ["--data", "x", "--typo", "1"]])
def test_a_wrong_command_line_is_one_line_that_points_to_help_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        from_cli(Example, argv)
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and "--help" in text
    assert ("--data" if not argv else argv[2]) in text


def test_help_shows_each_help_text_and_default(capsys):
    with pytest.raises(SystemExit):
        from_cli(Example, ["--help"])
    text = capsys.readouterr().out
    assert "An example command." in text and "a rate, 50% of it" in text and "(default: 0.0001)" in text


def test_a_user_error_is_one_line_on_stderr_and_status_2(capsys):
    def main():
        raise UserError("no such file:\n   x.wav")

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: no such file: x.wav\n"


def test_words_without_a_flag_become_a_tuple_in_their_order():
    @dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = words(help="names")
        size: int = flag(1, help="size")

    assert from_cli(Config, []).names == ()
    assert from_cli(Config, ["b", "a", "--size", "2"]) == Config(("b", "a"), 2)
    assert from_cli(Config, ["b", "--size", "2", "a"]) == Config(("b", "a"), 2)


def test_a_folder_that_cannot_be_made_is_told_with_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--out"):
            make_folder(path, "--out")
    make_folder(tmp_path / "a" / "b", "--out")
    assert (tmp_path / "a" / "b").is_dir()
