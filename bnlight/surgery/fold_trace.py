"""Which layer's output goes to which norm: read from the model's forward by torch.fx, as far as that can follow it."""

from __future__ import annotations

import ast
import inspect
import itertools
import operator
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Paths = dict[nn.Module, str]

_IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
SHAPE_READS = ("size", "dim", "ndimension", "numel", "is_floating_point", "shape", "ndim", "dtype", "device")


class Flow:
    """The calls of a model's layers and norms (`ends`), in evaluation and with default arguments.

    What `torch.fx` cannot trace is left closed, and its submodules are traced for themselves; `closed` gives for
    such a module the reason, and `unseen` for each layer or norm whose calls are not all known.

    The model is a copy that nobody else uses: tracing calls its Python code, and hooks are taken off.
    """

    def __init__(self, model: nn.Module, ends: set[nn.Module]) -> None:
        self.paths: Paths = {module: path for path, module in model.named_modules()}
        self.ends = ends
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        self.module_of: dict[fx.Node, nn.Module] = {}
        self.unseen: dict[nn.Module, str] = {}
        self.closed: dict[nn.Module, str] = {}
        self.hooked = {module for module in self.paths if has_hooks(module)}
        for module in self.paths:
            take_hooks_off(module)
        self._graphs: list[fx.Graph] = []  # a node lives as long as its graph
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._follow(model)

    def _follow(self, root: nn.Module) -> None:
        """Trace from `root` on, around the modules that do not let themselves be traced."""
        waiting, met = [root], set()
        while waiting:
            module = waiting.pop()
            if module in met or not any(m in self.ends for m in module.modules()):
                continue
            met.add(module)
            if module in self.ends:
                self._hide(module, "the model is this layer alone")
                continue
            before = set(self.closed)
            tracer = self._trace(module)
            if tracer is not None:
                self._collect(tracer)
            for closed in self.closed.keys() - before:
                waiting += self._open(closed)

    def _trace(self, root: nn.Module) -> Tracer | None:
        """The trace of `root` with its defaults, None if it cannot be traced."""
        defaults, closed = _defaults(root), set(self.closed)
        while True:
            tracer = Tracer(self.ends, closed, self.hooked)
            try:
                tracer.graph = tracer.trace(root, defaults or None)
            except Exception as error:  # whatever a forward does with what is no tensor
                failed = root if tracer.failed is None else tracer.failed
                self.closed[failed] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                if failed is root:
                    return None
                closed.add(failed)
                continue
            break
        if defaults:  # what is called in another way when they are given counts too, if it can be seen
            general = Tracer(self.ends, closed, self.hooked)
            with suppress(Exception):
                general.graph = general.trace(root)
                self._collect(general)
        return tracer

    def _collect(self, tracer: Tracer) -> None:
        self._graphs.append(tracer.graph)
        for node, module in tracer.module_of.items():
            self.module_of[node] = module
            self.calls.setdefault(module, []).append(node)
            if module not in self.ends and module not in self.closed:
                for inner in module.modules():
                    self._hide(inner, f"it is inside of {self._name(module)}, which is not looked into")
        taken = {node.target for node in tracer.graph.nodes if node.op == "get_attr"}
        tensors = {id(_attribute(tracer.root, target)) for target in taken}
        for module in self.ends:
            own = (*module._parameters.values(), *module._buffers.values())
            if any(id(tensor) in tensors for tensor in own if tensor is not None):
                self._hide(module, "its parameters or buffers are used outside of it")

    def _open(self, parent: nn.Module) -> Iterator[nn.Module]:
        """The submodules of a module that cannot be traced, those that can be followed on their own."""
        for name, child in parent.named_children():
            if child in self.ends:
                self._hide(child, f"{self._name(parent)} cannot be traced ({self.closed[parent]})")
            elif isinstance(child, nn.Sequential) and _taken_apart(parent, name):
                for inner in child.modules():
                    reason = f"takes {name} apart and cannot be traced ({self.closed[parent]})"
                    self._hide(inner, f"{self._name(parent)} {reason}")
            else:
                yield child

    def _hide(self, module: nn.Module, reason: str) -> None:
        if module in self.ends:
            self.unseen.setdefault(module, reason)

    def _name(self, module: nn.Module) -> str:
        return f"'{self.paths[module]}'" if self.paths[module] else type(module).__name__

    def has_one_input(self, node: fx.Node) -> bool:
        """Whether a call has an input and nothing else, such as a mask."""
        return _input(node) is not None

    def source(self, node: fx.Node, through: Callable[[nn.Module], bool]) -> nn.Module | None:
        """Whose output the call `node` gets, if that output goes nowhere else; `through` such modules."""
        before = _input(node)
        while before is not None:
            module = self.module_of.get(before)
            if module is None or len(_readers(before)) != 1:
                return None
            if not through(module):
                return module
            before = _input(before)
        return None

    def target(self, node: fx.Node, through: Callable[[nn.Module], bool]) -> nn.Module | None:
        """Who gets the output of the call `node`, if only one does, as its only input; `through` such modules."""
        while True:
            readers = _readers(node)
            module = self.module_of.get(readers[0]) if len(readers) == 1 else None
            if module is None or _input(readers[0]) is not node:
                return None
            if not through(module):
                return module
            node = readers[0]

    def changed_before(self, node: fx.Node, through: Callable[[nn.Module], bool]) -> bool:
        """Whether anything between the call `node` and its target may change a tensor in place."""
        end = self.target(node, through)
        for later in itertools.takewhile(lambda n: self.module_of.get(n) is not end, _after(node)):
            module = self.module_of.get(later)
            if module is not None and module not in self.closed:
                parts: list[Any] = [] if through(module) else [*module.modules()]
                if any(getattr(part, "inplace", False) for part in parts):
                    return True
            elif later.op.startswith("call"):
                name = str(getattr(later.target, "__name__", later.target))
                own = name.endswith("_") and not name.endswith("__")
                if module is not None or own or later.kwargs.get("inplace") or name in _IN_PLACE:
                    return True
        return False

    def reason(self, node: fx.Node, through: Callable[[nn.Module], bool]) -> str:
        """Why the call `node` has no layer before it: for people."""
        before = _input(node)
        assert before is not None
        while (module := self.module_of.get(before)) is not None and len(_readers(before)) == 1:
            earlier = _input(before)
            if not through(module) or earlier is None:
                return f"its input comes from {self._name(module)} ({type(module).__name__})"
            before = earlier
        if module is not None:
            return f"the output of {self._name(module)} goes elsewhere too"
        if before.op == "placeholder":
            return "its input is the model's, or that of a submodule that cannot be traced from outside"
        return f"its input comes from {getattr(before.target, '__name__', before.target)}"


class Tracer(fx.Tracer):
    """fx's tracer with leaves of our choice, which remembers the modules called, and the innermost that failed."""

    def __init__(self, ends: set[nn.Module], closed: set[nn.Module], hooked: set[nn.Module]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.ends, self.closed, self.hooked = ends, closed, hooked
        self.module_of: dict[fx.Node, nn.Module] = {}
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.ends or m in self.closed or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m in self.hooked:
            args = tuple(self._shown(value) for value in args)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = m if self.failed is None else self.failed
            raise
        if isinstance(result, fx.Proxy) and result.node.op == "call_module" and self.is_leaf_module(m, ""):
            self.module_of[result.node] = m
        return self._shown(result) if m in self.hooked else result

    def _shown(self, value: Any) -> Any:
        """What a hook may look at or change: no direct way from one layer to the next."""
        return (
            self.create_proxy("call_function", operator.pos, (value,), {})
            if isinstance(value, fx.Proxy)
            else value
        )


def is_idle(module: nn.Module) -> bool:
    """Whether a module hands on its input in evaluation."""
    return type(module) is nn.Identity or (
        isinstance(module, _DropoutNd) and type(module).__module__ == "torch.nn.modules.dropout"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of a module, or changes them; not torch's hooks that compute weights."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return not all(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks)


def take_hooks_off(module: nn.Module) -> None:
    """Leave a module only the hooks of torch that compute weights."""
    for name, hooks in vars(module).items():
        if name.endswith("hooks") and isinstance(hooks, dict):
            kept = {key: hook for key, hook in hooks.items() if isinstance(hook, WeightNorm | SpectralNorm)}
            hooks.clear()
            hooks.update(kept)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The forward's arguments that need not be given."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _after(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind this one, in the order of the forward."""
    while (node := node.next).op != "root":
        yield node


def _attribute(root: nn.Module, target: Any) -> Any:
    return operator.attrgetter(target)(root)


def _input(node: fx.Node) -> fx.Node | None:
    """The one input of a call, None if it has several."""
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], fx.Node) else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who uses the values of a node, not only its shape."""
    return [user for user in node.users if not _reads_shape(user)]


def _reads_shape(user: fx.Node) -> bool:
    name = user.args[1] if user.target is getattr else user.target if user.op == "call_method" else None
    return name in SHAPE_READS


def _taken_apart(parent: nn.Module, name: str) -> bool:
    """Whether the code of `parent` may do more with its submodule `name` than call it."""
    for kind in type(parent).__mro__:
        if kind.__module__.startswith("torch.nn."):
            return False
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):
            return True
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name != "__init__"]
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.Attribute) and node.attr == name and id(node) not in called:
                return True
    return False
