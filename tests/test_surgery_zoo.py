"""Surgery on a zoo of networks, by properties: what should be equal is, twice is once, nothing is lost."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from bnlight import replace_norm
from bnlight.norm import NORMS
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery.parameters import TORCH_NORMS

SUBCLASSED = {"subclassed"}
LAZY = {"lazy"}
TAME = [name for name in ZOO if name not in SUBCLASSED | LAZY]
TORCHS = [name for name in TAME if not name.startswith("our_")]


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    # copied, so that hooks and modes are as they were
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin(x)


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a step in the mode the model is in, dropout drawn alike."""
    torch.manual_seed(1)
    model.zero_grad()
    y = model(x)
    (y.float() ** 2).mean().backward()
    return y.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def own_name(layer: nn.Module) -> str | None:
    """The name of bnlight's norm that computes what torch's layer does."""
    for kind, name in (
        (nn.modules.batchnorm._BatchNorm, "batch"),
        (nn.GroupNorm, "group"),
        (nn.modules.instancenorm._InstanceNorm, "instance"),
        (nn.RMSNorm, "rms"),
        (nn.LayerNorm, "layer"),
    ):
        if isinstance(layer, kind):
            return name
    return None


@pytest.mark.parametrize("name", TORCHS)
def test_the_same_norm_gives_the_same_network(name):
    model, x = ZOO[name]()
    before, keys = evaluated(model, x), list(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, twin = list(model.parameters()), copy.deepcopy(model)
    for norm in {own_name(m) for m in model.modules() if isinstance(m, TORCH_NORMS)}:
        replace_norm(model, norm, include=lambda _, layer, norm=norm: own_name(layer) == norm)
    assert not [m for m in model.modules() if isinstance(m, TORCH_NORMS)]
    assert [*model.state_dict()] == keys
    for key, value in model.state_dict().items():
        assert torch.equal(value.to(state[key].dtype), state[key]), key
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    loose = {torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(x.dtype, 2e-5)
    torch.testing.assert_close(evaluated(model, x), before, rtol=loose, atol=loose)
    y, gradients = trained(model, x)
    expected, theirs = trained(twin, x)
    torch.testing.assert_close(y, expected, rtol=loose, atol=loose)
    for mine, their in zip(gradients, theirs, strict=True):
        scale = 1 + float(their.abs().max())
        torch.testing.assert_close(mine, their, rtol=10 * loose, atol=10 * loose * scale)
    for (key, mine), their in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine.to(their.dtype), their, rtol=loose, atol=loose, msg=key)


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name in TAME for norm in (("group",) if name.startswith("timm") else NORMS)],
)
def test_any_norm_trains_in_any_network_and_twice_is_once(name, norm):
    model, x = ZOO[name]()
    report = replace_norm(model, norm)
    assert {row.new for row in report.replaced} <= {NORMS[norm].__name__}
    layers, shown = [*model.modules()], repr(model)
    again = replace_norm(model, norm)
    assert not again.replaced
    assert {row.reason for row in again if not row.shared_with} <= {
        "it is so already",
        "a norm of another library, of which only the name is known",
    }
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert repr(model) == shown
    if norm in ("instance", "batch_instance") and name in ("mlp", "lstm_classifier"):
        return  # there is one value per channel, which these refuse
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one value per group, in networks this narrow
        y, gradients = trained(model, x)
        evaluated(model, x)
    assert y.isfinite().all()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", TAME)
def test_there_and_back_is_where_we_were(name):
    model, x = ZOO[name]()
    replace_norm(model, "batch")
    before, state = evaluated(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    for norm in ("renorm", "batch"):  # the former needs running statistics
        replace_norm(model, norm, include=lambda _, layer: layer.running_mean is not None)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(evaluated(model, x), before)


@pytest.mark.parametrize("name", [name for name in TAME if name != "parametrized"])
def test_a_network_with_new_norms_is_copied_and_pickled(name):
    model, x = ZOO[name]()
    replace_norm(model, "renorm")
    before = evaluated(model, x)  # of a copy
    if name == "hooked":
        return  # its hooks are lambdas
    twin = pickle.loads(pickle.dumps(model)).eval()
    with torch.no_grad():
        assert torch.equal(twin(x), before)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*SUBCLASSED])
def test_a_network_of_subclasses_is_refused_whole(name):
    model, x = ZOO[name]()
    before, layers = evaluated(model, x), [*model.modules()]
    with pytest.raises(
        ValueError, match=r"BatchNormReLU would lose its forward\(\), act \('norm1', 'norm2'\)"
    ):
        replace_norm(model, "group")
    assert [*model.modules()] == layers
    assert torch.equal(evaluated(model, x), before)


@pytest.mark.parametrize("name", [*LAZY])
def test_a_lazy_network_is_replaced_once_it_has_seen_a_batch(name):
    model, x = ZOO[name]()
    with pytest.raises(ValueError, match=r"'1' \(LazyBatchNorm2d\) is lazy and has seen no input"):
        replace_norm(model, "batch")
    model(x)
    before = evaluated(model, x)
    assert replace_norm(model, "batch").replaced[0].old == "BatchNorm2d"
    assert isinstance(model[1], BatchStatistics)
    assert model[1].num_features == 4
    torch.testing.assert_close(evaluated(model, x), before)
