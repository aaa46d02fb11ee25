"""The way from hidden states to a loss and its gradients, block by block, beside autograd over all rows at once."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.kernel_inputs import FORCED, random_layout
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from gold.kernels import logits, tables
from gold.kernels.lm_head import summed, token_logp, token_loss
from gold.kernels.logits import GivenLogits, HeadLogits, LazyLogits, spans
from gold.kernels.tables import byte_tables
from gold.models.hidden_states import head_logits

STOPS = torch.tensor([3])
WIDTH, HIDDEN, COUNT = 41, 8, 11


def states(seed: int = 1) -> Tensor:
    return torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WIDTH, num_key_value_heads=2, **sizes, **changes))


def with_bias() -> nn.Module:
    model = llama()
    model.lm_head = nn.Linear(HIDDEN, WIDTH)
    return model


def with_adapter() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))


def with_a_soft_cap() -> nn.Module:
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=WIDTH, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, final_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "untied": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(tie_word_embeddings=True),
    "bias": with_bias,
    "adapter": with_adapter,
    "soft cap": with_a_soft_cap,
    "frozen": lambda: llama().requires_grad_(False),
}


def few_rows(monkeypatch: pytest.MonkeyPatch, rows: int = 4) -> None:
    monkeypatch.setattr(logits, "BLOCK_BYTES", 4 * WIDTH * rows)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft


def gradients(model: nn.Module, hidden: Tensor, value: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [hidden, *trained], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, [hidden, *trained], strict=True)]


def naive(model: nn.Module, hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = plain.get_output_embeddings()(hidden)
    if cap := getattr(plain.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    logp = torch.log_softmax(logits.float(), -1)
    return -(weight * logp.gather(1, target[:, None])[:, 0]).sum()


TARGET = torch.arange(COUNT) * 5 % WIDTH
WEIGHT = torch.linspace(0.0, 2.0, COUNT)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_made_with_the_value_are_those_of_autograd(name, monkeypatch):
    few_rows(monkeypatch)
    model, hidden = MODELS[name](), states()
    rows = head_logits(model, hidden)
    value = token_loss(rows, TARGET, WEIGHT, STOPS)
    expected = naive(model, hidden, TARGET, WEIGHT)
    torch.testing.assert_close(value, expected)
    for mine, theirs in zip(
        gradients(model, hidden, 0.3 * value), gradients(model, hidden, 0.3 * expected), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert (name == "frozen") == (not rows.weights)


@pytest.mark.parametrize("name", ["frozen", "frozen, bias", "frozen, soft cap"])
def test_blocks_in_turn_share_their_memory_where_nothing_is_learned(name):
    kind = name.removeprefix("frozen, ")
    model, hidden = MODELS[kind]().requires_grad_(False), states()
    rows = head_logits(model, hidden)
    whole = rows.logits()
    in_turn = rows.in_turn()
    parts = [slice(0, 4), slice(4, 8), slice(8, COUNT)]
    with torch.no_grad():
        first, *others = (in_turn.select(part).logits() for part in parts)
        assert {logits.data_ptr() for logits in others} == {first.data_ptr()}
        torch.testing.assert_close(others[-1], whole[parts[-1]])
        torch.testing.assert_close(in_turn.select(parts[0]).logits(), whole[parts[0]])
        assert in_turn.logits().data_ptr() != first.data_ptr()  # there is no room for all of them
    # With gradients every block keeps its own.
    kept = [in_turn.select(part).logits() for part in parts]
    torch.testing.assert_close(torch.cat(kept), whole)
    (grad,) = torch.autograd.grad(torch.cat(kept).square().sum(), hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(whole.square().sum(), hidden)[0])


@pytest.mark.parametrize("name", ["untied", "adapter"])
def test_rows_that_are_made_again_give_the_same(name, monkeypatch):
    few_rows(monkeypatch)
    model, hidden = MODELS[name](), states()
    logp, _ = token_logp(head_logits(model, hidden), TARGET, STOPS)
    expected = naive(model, hidden, TARGET, WEIGHT)
    for mine, theirs in zip(
        gradients(model, hidden, -(WEIGHT * logp).sum()), gradients(model, hidden, expected), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_second_backward_pass_is_refused_and_the_gradients_of_the_first_stay():
    model, hidden = llama(), states()
    value = token_loss(head_logits(model, hidden), TARGET, WEIGHT, STOPS)
    value.backward(retain_graph=True)
    kept = hidden.grad.clone(), model.lm_head.weight.grad.clone()
    with pytest.raises(RuntimeError, match="only one backward pass"):
        value.backward()
    assert torch.equal(hidden.grad, kept[0])
    assert torch.equal(model.lm_head.weight.grad, kept[1])


def test_each_row_is_multiplied_once_forward(monkeypatch):
    few_rows(monkeypatch)
    seen: list[int] = []
    model, hidden = llama(), states()
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    rows = head_logits(model, hidden)
    made = HeadLogits(
        hidden, lambda h, *w: seen.append(h.shape[0]) or rows.head(h, *w), WIDTH, weights=rows.weights
    )
    token_loss(made, TARGET, WEIGHT, STOPS).backward()
    assert sum(seen) == COUNT


def test_gradients_add_up_over_microbatches_and_without_a_gradient_there_is_only_the_value(monkeypatch):
    few_rows(monkeypatch)
    model = llama()
    hidden = [states(1), states(2)]
    for h in hidden:
        token_loss(head_logits(model, h), TARGET, WEIGHT, STOPS).backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    sum(naive(other, h.detach(), TARGET, WEIGHT) for h in hidden).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, other.lm_head.weight.grad)
    with torch.no_grad():
        value = token_loss(head_logits(model, hidden[0]), TARGET, WEIGHT, STOPS)
    assert not value.requires_grad
    torch.testing.assert_close(value, naive(model, hidden[0], TARGET, WEIGHT).detach())


@pytest.mark.parametrize("name", ["tied", "adapter", "soft cap"])
def test_mixed_precision_multiplies_in_bfloat16_and_adds_up_in_single(name, monkeypatch):
    few_rows(monkeypatch)
    model, hidden = MODELS[name](), states()
    with torch.autocast("cpu", torch.bfloat16):
        rows = head_logits(model, hidden)
        assert rows.logits().dtype == torch.bfloat16
        value = token_loss(rows, TARGET, WEIGHT, STOPS)
        expected = naive(model, hidden, TARGET, WEIGHT)
    mine, theirs = gradients(model, hidden, value), gradients(model, hidden, expected)
    exact = gradients(model, hidden, naive(model, hidden, TARGET, WEIGHT))
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)
    for x, y, truth in zip(mine, theirs, exact, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert (x - truth).abs().max() <= 1.2 * (y - truth).abs().max() + 1e-2


@pytest.mark.parametrize("backend", FORCED, indirect=True)
@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("name", ["frozen", "soft cap", "bias"])
def test_a_matrix_in_the_order_in_which_it_is_read_gives_the_same(name, stopped, backend, monkeypatch):
    layout = random_layout(3, stopped=stopped)
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", layout.trie.trie.size + 3)
    few_rows(monkeypatch)
    model = MODELS[name]().requires_grad_(False)
    rows = head_logits(model, torch.randn(layout.rows, HIDDEN, requires_grad=True))
    results = []
    for scattered in ({"cpu"}, set()):
        monkeypatch.setattr(tables, "SCATTERED", scattered)
        found = byte_tables(rows, layout)
        value = sum(torch.where(x.isfinite(), x, 0.0).sum() for x in found)
        results.append((*found, *torch.autograd.grad(value, rows.hidden_ND)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_matrix_that_is_trained_or_wrapped_stays_where_it_is():
    hidden = states()
    assert head_logits(MODELS["frozen"](), hidden).reordered is not None
    for name in ("untied", "adapter", "bias"):
        assert head_logits(MODELS[name](), hidden).reordered is None
    frozen = MODELS["frozen"]()
    frozen.lm_head._hf_hook = object()
    assert head_logits(frozen, hidden).reordered is None


def test_parameters_that_nobody_lists_are_an_error():
    matrix = torch.randn(WIDTH, HIDDEN, requires_grad=True)
    rows = HeadLogits(states(), lambda h: h @ matrix.T, WIDTH)
    with pytest.raises(ValueError, match="parameters that need a gradient"):
        token_loss(rows, TARGET, WEIGHT, STOPS)


def test_numbers_beside_the_rows_get_their_gradient():
    hidden, beside = states(), torch.linspace(-1.0, 1.0, COUNT).requires_grad_(True)
    rows = HeadLogits(hidden, lambda h: h * 2.0, HIDDEN)

    def value(block: LazyLogits, part: int, x: Tensor) -> tuple[Tensor, ...]:
        return (part * block.logits().sum(-1) * x.exp()).sum(), block.logits().sum(-1)

    index = [(torch.tensor([4, 0, 9]), 1), (torch.tensor([0, 1]), 2)]
    total, others = summed(value, rows, index, beside)
    weight = torch.zeros(COUNT)
    for rows_, part in index:
        weight[rows_] += part
    expected = (weight * 2.0 * hidden.sum(-1) * beside.exp()).sum()
    torch.testing.assert_close(total, expected)
    assert not others.requires_grad
    assert others.shape == (5,)
    for mine, theirs in zip(
        torch.autograd.grad(total, (hidden, beside)),
        torch.autograd.grad(expected, (hidden, beside)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_no_rows_are_one_empty_block():
    assert spans(0, 4) == [slice(0, 0)]
    assert spans(5, 4) == [slice(0, 4), slice(4, 5)]
    rows = GivenLogits(torch.zeros(0, WIDTH, requires_grad=True))
    none = torch.zeros(0, dtype=torch.int64)
    value = token_loss(rows, none, none.float(), STOPS)
    assert value.item() == 0.0


def test_a_compiled_model_gives_the_same(monkeypatch):
    few_rows(monkeypatch)
    model, hidden = llama(), states()
    expected = gradients(model, hidden, token_loss(head_logits(model, hidden), TARGET, WEIGHT, STOPS))
    model.model = torch.compile(model.model, backend="eager")
    rows = head_logits(model, hidden)
    found = gradients(model, hidden, token_loss(replace(rows), TARGET, WEIGHT, STOPS))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


PEAK = """
    import resource, torch
    from gold.kernels import logits
    from gold.kernels.logits import HeadLogits
    from gold.kernels.reference import MixedKL
    from gold.kernels.shared import SharedEvents, shared_divergence
    logits.BLOCK_BYTES = 2**22
    rows, width = {rows}, 20_000
    matrix = torch.randn(width, 16, requires_grad=True)
    head = lambda h, *w: logits.linear(h, w[0] if w else matrix)
    mine = HeadLogits(torch.randn(rows, 16, requires_grad=True), head, width, weights=(matrix,))
    theirs = HeadLogits(torch.randn(rows, 16), lambda h: h @ matrix.detach().T, width)
    every = torch.arange(width)
    events = SharedEvents(every[1:], every[1:], every[:1], every[:1])
    total, _ = shared_divergence(mine, theirs, events, MixedKL(student=1.0))
    total.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_the_peak_of_memory_does_not_grow_with_the_number_of_rows():
    """2,000 rows of 20,000 columns are 160 MB; a block is 4 MB."""

    def peak_mib(rows: int) -> int:
        code = textwrap.dedent(PEAK.format(rows=rows))
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert peak_mib(2000) < peak_mib(100) + 60
