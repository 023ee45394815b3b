"""The encoder: causal, blind to padding, differentiable, and SASRec as published."""

import dataclasses
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.modules.dropout import PositionKeys
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder, saved_floats
from shardrec.modules.length_groups import LengthGroups

CONFIGS = {
    "sasrec": EncoderConfig(width=8, max_length=7, num_heads=2),
    "modern-rms-rotary": EncoderConfig(width=8, max_length=7, num_heads=2, kind="modern"),
    "modern-layer-learned": EncoderConfig(
        width=8, max_length=7, num_heads=2, kind="modern", norm="layer", positions="learned"
    ),
    "sasrec-from-last": EncoderConfig(
        width=8, max_length=7, num_heads=2, positions="learned_from_last"
    ),
    "ligr": EncoderConfig(width=8, max_length=7, num_heads=2, kind="ligr"),
    "hstu": EncoderConfig(width=8, max_length=7, num_heads=2, kind="hstu"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def vectors_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_config
def test_padding_never_changes_a_real_position(config: EncoderConfig) -> None:
    encoder = TransformerEncoder(config).eval()
    vectors = vectors_of(3, 7, 8)
    padded = vectors.clone()
    padded[:, 4:] = 1e4
    lengths = torch.full((3,), 4)
    expected = encoder(vectors[:, :4])
    torch.testing.assert_close(encoder(padded, lengths)[:, :4], expected)
    torch.testing.assert_close(encoder(vectors, lengths)[:, :4], expected)
    if not encoder.reads_lengths:
        torch.testing.assert_close(encoder(padded)[:, :4], expected)


LENGTHS = torch.tensor([3, 7, 1, 0, 7, 2, 2, 3, 6, 1])


def grouped(encoder: TransformerEncoder, vectors: Tensor, groups: LengthGroups) -> Tensor:
    keys = PositionKeys(groups.sort(torch.arange(len(vectors))))
    return groups.restore(encoder.packed(groups.sort(vectors), groups, keys))


@each_config
@pytest.mark.parametrize("training", [False, True])
def test_states_and_gradients_do_not_depend_on_the_groups(
    config: EncoderConfig, training: bool
) -> None:
    """With dropout too: what it drops depends on the key of a position alone."""
    config = dataclasses.replace(config, dropout=0.3, attention_dropout=0.3)
    encoder = TransformerEncoder(config).double().train(training)
    vectors = vectors_of(int(LENGTHS.sum()), 8).double().requires_grad_()
    together = LengthGroups.of(LENGTHS)
    assert 1 < len(together.groups) < (LENGTHS > 0).sum()
    alone = LengthGroups.of(LENGTHS, least_saved=0)
    one_padded = LengthGroups.of(LENGTHS, least_saved=10)
    assert len(one_padded.groups) == 1
    weights = vectors_of(*vectors.shape, seed=1).double()
    expected = grouped(encoder, vectors, alone)
    wanted = torch.autograd.grad((expected * weights).sum(), [vectors, *encoder.parameters()])
    for groups in (together, one_padded):
        states = grouped(encoder, vectors, groups)
        torch.testing.assert_close(states, expected)
        found = torch.autograd.grad((states * weights).sum(), [vectors, *encoder.parameters()])
        torch.testing.assert_close(found, wanted)
    if not training:
        padded = nn.utils.rnn.pad_sequence(vectors.split(LENGTHS.tolist()), batch_first=True)
        real = torch.arange(7) < LENGTHS[:, None]
        torch.testing.assert_close(encoder(padded, LENGTHS)[real], expected)


def test_positions_from_the_last_are_those_of_left_padding() -> None:
    """And so a state depends on the number of later items, but not on which they are."""
    encoder = TransformerEncoder(CONFIGS["sasrec-from-last"]).double().eval()
    state = encoder.state_dict()
    vectors = vectors_of(1, 5, 8).double()
    first = dict(state, position_vectors=state["position_vectors"][2:])
    torch.testing.assert_close(encoder(vectors), published_sasrec(vectors, first, num_heads=2))
    longer = torch.cat((vectors, vectors_of(1, 2, 8, seed=1).double()), 1)
    other = torch.cat((vectors, vectors_of(1, 2, 8, seed=2).double()), 1)
    torch.testing.assert_close(encoder(longer)[:, :5], encoder(other)[:, :5])
    assert (encoder(longer)[:, :5] - encoder(vectors)).abs().max() > 1e-3


@each_config
def test_padding_gets_no_gradient_from_real_positions(config: EncoderConfig) -> None:
    encoder = TransformerEncoder(config)
    vectors = vectors_of(2, 7, 8).requires_grad_()
    encoder(vectors, torch.full((2,), 4))[:, :4].square().sum().backward()
    assert vectors.grad is not None
    assert not vectors.grad[:, 4:].any()
    assert vectors.grad[:, :4].abs().sum() > 0


@each_config
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_position_sees_itself_and_the_past_only(config: EncoderConfig, changed: int) -> None:
    encoder = TransformerEncoder(config).eval()
    vectors = vectors_of(2, 7, 8)
    other = vectors.clone()
    other[:, changed] += torch.tensor([1.0, -1.0] * 4)
    moved = (encoder(vectors) - encoder(other)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [position >= changed for position in range(7)]


@each_config
def test_every_parameter_and_the_input_get_a_right_gradient(config: EncoderConfig) -> None:
    encoder = TransformerEncoder(config).double().eval()
    vectors = vectors_of(2, 3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(encoder, (vectors,))
    # A weighted sum: the plain sum of squares is constant behind a norm.
    (encoder(vectors) * vectors_of(2, 3, 8, seed=1)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@each_config
@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 7, 8), (0, 5, 8), (0, 0, 8), (2, 0, 8)])
def test_odd_sizes_work(config: EncoderConfig, shape: tuple[int, int, int]) -> None:
    encoder = TransformerEncoder(config)
    vectors = vectors_of(*shape).requires_grad_()
    states = encoder(vectors)
    assert states.shape == shape
    states.sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@each_config
def test_one_position_of_a_batch_depends_on_nothing_else_in_it(config: EncoderConfig) -> None:
    encoder = TransformerEncoder(config).eval()
    vectors = vectors_of(5, 6, 8)
    torch.testing.assert_close(encoder(vectors[2:3]), encoder(vectors)[2:3])


@each_config
def test_weights_are_a_function_of_the_seed(config: EncoderConfig) -> None:
    torch.manual_seed(1)
    first = TransformerEncoder(config, seed=5).state_dict()
    torch.manual_seed(2)
    second = TransformerEncoder(config, seed=5).state_dict()
    third = TransformerEncoder(config, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_fused_projections_start_as_wide_as_separate_ones() -> None:
    config = EncoderConfig(width=64, max_length=5, kind="modern")
    bound = math.sqrt(6 / (64 + 64))
    for block in TransformerEncoder(config).blocks:
        for part in block.get_parameter("query_key_value.weight").chunk(3):
            assert 0.95 * bound < part.abs().max() <= bound


@each_config
def test_training_is_repeatable_under_a_seed_and_dropout_acts_only_there(
    config: EncoderConfig,
) -> None:
    encoder = TransformerEncoder(config)
    vectors = vectors_of(2, 7, 8)
    torch.manual_seed(3)
    first = encoder(vectors)
    torch.manual_seed(3)
    assert torch.equal(encoder(vectors), first)
    assert not torch.equal(encoder(vectors), first)
    encoder.eval()
    assert torch.equal(encoder(vectors), encoder(vectors))


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, epsilon: float = 1e-8) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    scaled = (x - mean) / (variance + epsilon).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def published_sasrec(vectors: Tensor, state: dict[str, Tensor], num_heads: int) -> Tensor:
    """The paper's network, one head and one position at a time."""
    _, length, width = vectors.shape
    head = width // num_heads
    x = vectors * width**0.5 + state["position_vectors"][:length]
    for block in range(2):
        normed = layer_norm(x, state, f"blocks.{block}.attention_norm")
        query = linear(normed, state, f"blocks.{block}.query")
        key, value = linear(x, state, f"blocks.{block}.key_value").split(width, dim=-1)
        mixed = torch.zeros_like(x)
        for start in range(0, width, head):
            part = slice(start, start + head)
            for i in range(length):
                scores = (query[:, i, None, part] * key[:, : i + 1, part]).sum(-1) / head**0.5
                share = scores.softmax(-1)[..., None]
                mixed[:, i, part] = (share * value[:, : i + 1, part]).sum(1)
        normed = layer_norm(normed + mixed, state, f"blocks.{block}.feed_forward_norm")
        inner = linear(normed, state, f"blocks.{block}.feed_forward_in").relu()
        x = normed + linear(inner, state, f"blocks.{block}.feed_forward_out")
    return layer_norm(x, state, "final_norm")


def test_sasrec_is_the_published_network() -> None:
    encoder = TransformerEncoder(CONFIGS["sasrec"], seed=4).double().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    vectors = vectors_of(3, 6, 8).double()
    expected = published_sasrec(vectors, encoder.state_dict(), num_heads=2)
    torch.testing.assert_close(encoder(vectors), expected)


def published_block(kind: str, x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """One head of LiGR or HSTU, one position at a time, from the papers."""
    length, width = x.shape[1:]
    normed = layer_norm(x, state, f"{name}.attention_norm", 1e-6)
    mixed = torch.zeros_like(x)
    if kind == "hstu":
        projected = F.silu(normed @ state[f"{name}.gate_query_key_value.weight"].T)
        gate, query, key, value = projected.split(width, dim=-1)
        for i in range(length):
            for j in range(i + 1):
                bias = state[f"{name}.distance_bias"][i - j]
                weight = F.silu((query[:, i] * key[:, j]).sum(-1) + bias) / 7
                mixed[:, i] += weight[:, None] * value[:, j]
        gated = layer_norm(mixed, state, f"{name}.mixed_norm", 1e-6) * gate
        return x + linear(gated, state, f"{name}.attention_out")
    query, key, value = (normed @ state[f"{name}.query_key_value.weight"].T).split(width, dim=-1)
    for i in range(length):
        share = ((query[:, i, None] * key[:, : i + 1]).sum(-1) / width**0.5).softmax(-1)
        mixed[:, i] = (share[..., None] * value[:, : i + 1]).sum(1)
    branch = mixed @ state[f"{name}.attention_out.weight"].T
    x = x + linear(x, state, f"{name}.gates.0").sigmoid() * branch
    normed = layer_norm(x, state, f"{name}.feed_forward_norm", 1e-6)
    gate, inner = (normed @ state[f"{name}.feed_forward_in.weight"].T).chunk(2, dim=-1)
    branch = (F.silu(gate) * inner) @ state[f"{name}.feed_forward_out.weight"].T
    return x + linear(x, state, f"{name}.gates.1").sigmoid() * branch


@pytest.mark.parametrize("kind", ["ligr", "hstu"])
def test_ligr_and_hstu_are_the_published_blocks(kind: Literal["ligr", "hstu"]) -> None:
    config = EncoderConfig(width=8, max_length=7, kind=kind, positions="learned")
    encoder = TransformerEncoder(config, seed=4).double().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    vectors, state = vectors_of(3, 6, 8).double(), encoder.state_dict()
    x = vectors * 8**0.5 + state["position_vectors"][:6]
    for block in range(2):
        x = published_block(kind, x, state, f"blocks.{block}")
    expected = layer_norm(x, state, "final_norm", 1e-6)
    torch.testing.assert_close(encoder(vectors), expected)


def test_rotary_scores_depend_on_distance_only() -> None:
    from shardrec.modules.encoder import _Rotary, _rotate

    rotation = _Rotary(CONFIGS["modern-rms-rotary"])(7)
    query, key = vectors_of(1, 2, 1, 4), vectors_of(1, 2, 1, 4, seed=1)
    turned_query = _rotate(query.expand(1, 2, 7, 4), rotation)
    turned_key = _rotate(key.expand(1, 2, 7, 4), rotation)
    scores = turned_query @ turned_key.transpose(-1, -2)  # (1, 2, L, L)
    torch.testing.assert_close(scores[..., 2, 1], scores[..., 6, 5])
    torch.testing.assert_close(scores[..., 0, 0], (query * key).sum(-1)[..., 0])
    assert not torch.allclose(scores[..., 6, 1], scores[..., 6, 5])


@each_config
def test_bfloat16_autocast_stays_near_float32(config: EncoderConfig) -> None:
    encoder = TransformerEncoder(config).eval()
    vectors = vectors_of(2, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = encoder(vectors)
    assert (states.float() - encoder(vectors)).abs().max() < 0.1


@each_config
def test_a_saved_encoder_loads_strictly(config: EncoderConfig) -> None:
    source, copy = TransformerEncoder(config, seed=1).eval(), TransformerEncoder(config, seed=2)
    copy.load_state_dict(source.state_dict())
    vectors = vectors_of(2, 7, 8)
    assert torch.equal(copy.eval()(vectors), source(vectors))


def test_the_defaults_of_each_kind() -> None:
    sasrec = EncoderConfig(width=64, max_length=50)
    modern = EncoderConfig(width=64, max_length=50, kind="modern")
    assert (sasrec.resolved_hidden, sasrec.resolved_attention_dropout) == (64, 0.2)
    assert (sasrec.resolved_norm, sasrec.resolved_positions) == ("layer", "learned")
    assert modern.resolved_hidden == 16 * math.ceil(64 * 8 / 3 / 16) == 176
    assert modern.resolved_attention_dropout == 0.0
    assert (modern.resolved_norm, modern.resolved_positions) == ("rms", "rotary")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "encoder.width must be at least 1, got 0"),
        ({"num_blocks": 0}, "encoder.num_blocks must be at least 1"),
        ({"hidden": -1}, "encoder.hidden must be at least 1"),
        ({"num_heads": 3}, "divisible by encoder.num_heads, got 8 and 3"),
        ({"kind": "gpt"}, "encoder.kind must be one of sasrec, modern, ligr, hstu, got 'gpt'"),
        ({"dropout": 1.0}, r"encoder.dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, "encoder.attention_dropout must be in"),
        ({"positions": "rotary"}, "use kind 'modern'"),
        ({"kind": "hstu", "hidden": 8}, "encoder.hidden must be none for kind 'hstu', got 8"),
        ({"norm": "rms"}, "use kind 'modern'"),
        ({"kind": "modern", "num_heads": 8}, "must be even for rotary positions, got 1"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{"width": 8, "max_length": 7, **changes})  # type: ignore[arg-type]


def test_vectors_of_another_shape_are_refused() -> None:
    encoder = TransformerEncoder(CONFIGS["sasrec"])
    with pytest.raises(ValueError, match=r"must be of shape \(B, L, 8\), got \(2, 7, 4\)"):
        encoder(torch.zeros(2, 7, 4))
    with pytest.raises(ValueError, match="at most 7 positions, got 8"):
        encoder(torch.zeros(2, 8, 8))


def test_attention_runs_through_the_fused_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    real = F.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        calls.append(options)
        return real(query, key, value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with_softmax = [config for config in CONFIGS.values() if config.kind != "hstu"]
    for config in with_softmax:
        TransformerEncoder(config).eval()(torch.zeros(1, 2, 8))
    assert calls == [{"dropout_p": 0.0, "is_causal": True}] * 2 * len(with_softmax)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.2, 0.0), (0.2, 0.2)], ids=str)
@pytest.mark.parametrize("kind", ["sasrec", "modern", "ligr", "hstu"])
def test_the_formula_of_saved_floats_counts_what_backward_keeps(
    kind: Literal["sasrec", "modern", "ligr", "hstu"], shares: tuple[float, float], num_heads: int
) -> None:
    config = EncoderConfig(
        width=32, max_length=32, kind=kind, num_heads=num_heads, dropout=shares[0],
        attention_dropout=shares[1],
    )  # fmt: skip
    encoder = TransformerEncoder(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = encoder(vectors_of(64, 32, 32).requires_grad_())
    kept.pop(states.untyped_storage().data_ptr(), None)
    counted = sum(size for place, size in kept.items() if place not in own) / 4
    assert saved_floats(config, 32) == pytest.approx(counted / states.shape[:2].numel(), rel=0.005)
