"""torch's private names: all in one module, and what it says happens where one is gone does."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from mnist_ops import _torch_private

MODULE = Path(_torch_private.__file__)
ROOT = Path(__file__).parents[1]
# Modules that PyTorch documents by these names, for AOTInductor and for dispatch modes.
DOCUMENTED = {"_inductor", "_python_dispatch"}
# What torch.nn.Module calls on its subclasses, and the versions in a saved state.
OVERRIDDEN = {"_apply", "_load_from_state_dict", "_metadata"}


def sources() -> list[Path]:
    """Our Python; of an installed package the tests and the package itself."""
    folders = {MODULE.parent, *(ROOT / name for name in ("tests", "benchmarks", "examples"))}
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def private_names(tree: ast.Module) -> set[tuple[int, str]]:
    """Attributes with one underscore and modules of torch with one, with their lines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            name = next((part for part in node.module.split(".") if part[0] == "_"), "")
        else:
            continue
        if name.startswith("_") and not name.startswith("__"):
            found.add((node.lineno, name))
    return found


def own_names(tree: ast.Module) -> set[str]:
    """What a module defines: functions, classes, variables, attributes, names of its fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_no_private_name_is_used_elsewhere():
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    ours = set().union(*map(own_names, trees.values())) | {path.stem for path in trees}
    assert len(trees) > 50
    allowed = ours | OVERRIDDEN | DOCUMENTED | {"_exit"}  # os._exit is public
    foreign = {
        (path.name, line, name)
        for path, tree in trees.items()
        for line, name in private_names(tree)
        if path != MODULE and name not in allowed
    }
    assert foreign == set()
    assert "_version" in {name for _, name in private_names(trees[MODULE])}


def without(monkeypatch, owner, name):
    """The module as it is where torch has no such name."""
    monkeypatch.delattr(owner, name)
    spec = importlib.util.spec_from_file_location("without", MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch._C, "_AutoDispatchBelowAutograd"), (forward_ad, "_set_fwd_grad_enabled")],
    ids=str,
)
def test_what_cannot_be_done_without_ends_the_import(monkeypatch, owner, name):
    with pytest.raises(ImportError, match=rf"needs {owner.__name__}.{name}, a private name that"):
        without(monkeypatch, owner, name)


def test_a_schema_is_needed_when_it_is_asked_for():
    with pytest.raises(ImportError, match="_schema, a private name that torch"):
        _torch_private.arguments(len)


def test_without_autocasts_name_the_devices_with_kernels_are_asked(monkeypatch):
    module = without(monkeypatch, torch._C, "_is_any_autocast_enabled")
    assert not module.autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.autocast()
    assert not module.autocast()


def test_without_levels_every_tensor_may_have_a_tangent(monkeypatch):
    assert not _torch_private.past_eager()
    assert without(monkeypatch, forward_ad, "_current_level").past_eager()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_dispatch_tls_set_dispatch_key_excluded"),
        (torch._C, "_dispatch_tls_is_dispatch_key_excluded"),
        (torch._C, "DispatchKey"),
    ],
    ids=str,
)
def test_without_its_key_autograd_is_not_excluded(monkeypatch, owner, name):
    for module in (_torch_private, without(monkeypatch, owner, name)):
        key = module.AUTOGRAD
        before = module.is_excluded(key)
        module.exclude(key, True)
        assert module.is_excluded(key) is (module is _torch_private)
        module.exclude(key, before)
        assert not before and not module.is_excluded(key)


def test_without_an_entry_the_operator_is_called():
    assert _torch_private.entry(torch.relu) is torch.relu
    op = torch.ops.mnist_ops.sigmoid.default
    assert _torch_private.entry(op) is getattr(op, "_op")  # noqa: B009


@pytest.mark.parametrize("name", ["add", "add_", "mul_", "copy_", "sub"])
def test_lists_of_tensors_in_a_loop(monkeypatch, name):
    others = [torch.full((3,), 0.3), torch.rand(2, 2)]
    cases = [(0.7, {})] if name == "mul_" else [(others, {})]
    cases += [(others, {"alpha": -0.1})] if name.startswith("add") else []

    def results():
        for other, options in cases:
            tensors = [torch.arange(3.0), torch.ones(2, 2)]
            returned = _torch_private.foreach(name)(tensors, other, **options)
            yield tensors if name.endswith("_") else list(returned)

    with_it = list(results())
    monkeypatch.delattr(torch, f"_foreach_{name}")
    for one, two in zip(with_it, results(), strict=True):
        assert all(map(torch.equal, one, two))


def test_a_tensor_without_a_version_is_always_another():
    x = torch.zeros(2)
    before = _torch_private.version(x)
    assert before == _torch_private.version(x)
    x += 1
    assert before != _torch_private.version(x)
    with torch.inference_mode():
        unversioned = torch.zeros(2)
    for thing in (unversioned, object()):
        assert _torch_private.version(thing) != _torch_private.version(thing)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_seen_and_suspected_where_nobody_can_tell(kind):
    module = nn.ReLU()
    assert not _torch_private.has_hooks(module)
    getattr(module, f"register_{kind}_hook")(lambda *_: None)
    assert _torch_private.has_hooks(module)
    other = nn.ReLU()
    del other.__dict__[f"_{kind}_hooks".replace("full_", "")]
    assert _torch_private.has_hooks(other)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch._C, "_jit_get_all_schemas", lambda m: m.operators("mnist_ops")),
        (torch._C, "_dispatch_dump_table", lambda m: m.dispatch_table("mnist_ops::sigmoid")),
        (torch, "_neg_view", lambda m: m.negated(torch.ones(1))),
        (torch.cuda, "_sleep", lambda m: m.sleep_on_gpu(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_tests_call_is_needed_when_they_do(monkeypatch, owner, name, call):
    with pytest.raises(ImportError, match=f"needs {owner.__name__}.{name}, "):
        call(without(monkeypatch, owner, name))


def test_without_all_that_can_be_done_without():
    """The operators, their derivatives in both modes, training; torch.func: PyTorch's error."""
    code = """
        import sys
        import torch
        from torch.autograd import forward_ad
        # PyTorch's own modules keep what they have imported themselves.
        import torch._dynamo
        from torch import func
        for owner, name in (
            (torch._C._functorch, "peek_interpreter_stack"),
            (torch._functorch.autograd_function, "enable_single_level_autograd_function"),
            (torch._C, "_is_any_autocast_enabled"),
            (torch._C, "_dispatch_tls_set_dispatch_key_excluded"),
            *((torch, name) for name in dir(torch) if name.startswith("_foreach_")),
        ):
            delattr(owner, name)

        import mnist_ops
        from mnist_ops import _torch_private
        assert _torch_private.SingleLevelFunction is torch.autograd.Function
        assert _torch_private.transforms()
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        kernel = mnist_ops.gaussian1d(3).double()
        for operator in (
            lambda x: mnist_ops.lp_pool2d(x, 2, 2),
            lambda x: mnist_ops.contrastive_norm2d(x, kernel),
            mnist_ops.log_softmax,
            mnist_ops.sigmoid,
        ):
            assert torch.autograd.gradcheck(operator, x, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(operator, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert mnist_ops.log_softmax(x.bfloat16()).dtype == torch.float32
        try:
            func.grad(lambda x: mnist_ops.sigmoid(x).sum())(x.detach())
        except RuntimeError as error:
            print(str(error).splitlines()[0])

        from mnist_ops.torch7 import optim
        model = torch.nn.Linear(2, 2)
        sgd = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        before = model.weight.detach().clone()
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            sgd.step()
        assert not torch.equal(before, model.weight)
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    assert lines[-1:] == ["done"], result.stderr
    assert len(lines) == 2 and "functorch" in lines[0], lines
