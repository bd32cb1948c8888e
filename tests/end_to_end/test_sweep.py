"""Every model type of transformers can be slimmed: about forty of them here, all of them with `pytest -m slow`."""

import pytest
from sweep import sweep, write_page
from tiny import model_types
from verdict import KINDS, KindVerdict, Verdict, sweep_type

TYPES = (
    "albert bart beit bert bigbird_pegasus bloom clip codegen deberta deberta-v2 deepseek_v2 deepseek_v3 diffllama "
    "distilbert falcon gemma2 gpt2 gpt_bigcode gpt_neox gpt_oss gptj hubert llama llava longformer longt5 mixtral "
    "modernbert mpnet mpt nomic_bert olmo2 opt phi3 qwen2_moe qwen3 roformer siglip squeezebert swin t5 vit wav2vec2 "
    "whisper xglm xlnet"
).split()
LEFT_ALONE = {
    ("bloom", "mha"): "it adds ALiBi",
    ("mpt", "mha"): "is given position_bias",
    ("diffllama", "mha"): "lambda_q1",
}
"""The kinds that are not slimmed: a part of the reason."""
SOME_LEFT_ALONE = {
    ("bigbird_pegasus", "mha"): "replaces self by a new module",
    ("siglip", "mha"): "AttentionPoolingHead has no known layout",
}
"""The kinds of which some modules are not slimmed: a part of the reason for those."""


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tiny_model_of_the_type_is_slimmed_exactly(model_type):
    verdict = sweep_type(model_type)
    assert verdict.ran, verdict.reason
    assert not verdict.error
    assert not verdict.wrong
    assert not verdict.unreached
    for kind in KINDS:
        found = verdict.kinds[kind]
        expected = LEFT_ALONE.get((model_type, kind))
        assert found.state == ("slimmed" if expected is None else "skipped"), found.skipped
        expected = expected or SOME_LEFT_ALONE.get((model_type, kind))
        assert bool(found.skipped) == (expected is not None), found.skipped
        assert all(str(expected) in reason for _, reason in found.skipped), found.skipped


def test_the_page_has_every_reason_once_and_to_its_end(tmp_path):
    long = "its layers are " + ", ".join(f"layers.{n}.projection|{n}" for n in (0, 0, 1)) + 200 * " and more"
    skipped = [("layers.0", long), ("layers.1", long.replace("layers.1", "layers.2")), ("head", "it adds ALiBi")]
    kinds = {"ffn": KindVerdict(True, 4, []), "mha": KindVerdict(True, 0, skipped)}
    verdicts = [
        Verdict("one", True, True, kinds=kinds),
        Verdict("two", True, True, kinds=kinds, unproven=["blocks.0.fc", "blocks.1.fc"]),
        Verdict("three", reason="ValueError: no"),
    ]
    write_page(verdicts, tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
    starred = r"its layers are " + ", ".join(rf"layers.\*.projection\|{n}" for n in (0, 0, 1)) + 200 * " and more"
    assert [line for line in lines if line.startswith(("| one", "| two", "| three", "[^"))] == [
        "| one | slimmed 4 | skipped | attention, 3 skipped [^1] [^2] |",
        "| two | slimmed 4 | skipped | attention, 3 skipped [^1] [^2]; 2 not proven [^3] |",
        "| three | ValueError: no |",
        f"[^1]: {starred}",
        "[^2]: it adds ALiBi",
        r"[^3]: not proven: blocks.\*.fc",
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nearly_all_types_are_slimmed_exactly():
    verdicts = [verdict for verdict in sweep(model_types()) if verdict.built]
    assert len([v for v in verdicts if v.ran]) >= 350
    assert {v.model_type: v.wrong for v in verdicts if v.wrong} == {}
    assert {v.model_type: v.error for v in verdicts if v.error} == {}
    for kind, share in (("ffn", 0.98), ("mha", 0.93)):
        having = [v for v in verdicts if v.ran and v.kinds[kind].state != "none"]
        slimmed = [v for v in having if v.kinds[kind].state == "slimmed"]
        assert len(slimmed) >= share * len(having), [v.model_type for v in having if v not in slimmed]
