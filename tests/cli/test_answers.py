"""What a subcommand prints for people and for programs."""

import json
from dataclasses import dataclass
from typing import NamedTuple

from hf_slim.cli.answers import Answer, answer, to_json


@dataclass
class Part:
    """A dataclass."""

    value: float


class Found(NamedTuple):
    """Something with a dictionary of its own."""

    parts: tuple[Part, ...]

    def to_dict(self):
        return {"parts": self.parts, 3: None}


def test_programs_get_one_object_and_nothing_else(capsys):
    def work():
        print("on the way")
        return Found((Part(float("nan")), Part(2.5)))

    assert answer(work, as_json=True) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"parts": [{"value": None}, {"value": 2.5}], "3": None}
    assert captured.err == "on the way\n"


def test_people_get_the_text(capsys):
    assert answer(lambda: Answer("a table", {"rows": [1]}), as_json=False) == 0
    assert answer(lambda: "done", as_json=False) == 0
    assert capsys.readouterr().out == "\na table\n\ndone\n"
    assert to_json(Answer("a table", {"rows": (1, float("inf"))})) == {"rows": [1, None]}
