"""The examples in docs/python.md run."""

import re

from conftest import ROOT


def test_examples_run(capsys):
    text = (ROOT / "docs/python.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(examples) >= 7
    # One after the other, as somebody would who reads the page.
    scope = {"MODEL": str(ROOT / "tests/data/tiny-llama"), "DEVICE": "cpu"}
    for number, example in enumerate(examples):
        exec(compile(example, f"docs/python.md, example {number + 1}", "exec"), scope)
    assert "NotFoundError" in capsys.readouterr().out
