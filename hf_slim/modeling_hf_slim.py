"""Gives a freshly built model the sizes that its config records; written by hf_slim, and the same for every model.

hf_slim itself uses this file, and a copy of it lies beside every slim model whose sizes the config's own fields cannot
express. There it serves `from_pretrained(..., trust_remote_code=True)` where hf_slim is not installed: for the name of
any model class of transformers it has a subclass that resizes itself. It slices tensors and sets numbers; the weights
are then loaded as usual.
"""

import ast
import functools
import inspect
import math
import textwrap
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

RECORD_KEY = "hf_slim"
"""The key of the shape record in a config."""
RECORD_VERSION = 1
OUTSIDE = "../"
"""What names begin with that lie outside the base model; all others are relative to it."""
DENSE_SHAPES = "_hf_slim_dense_shapes"
"""Attribute of a module some of whose tensors are smaller: for their names the shapes that its config gives them."""
DENSE_NUMBERS = "_hf_slim_dense_numbers"
"""Attribute of a module some of whose attributes count fewer units: for their names what its config gives them."""

_OWN_ATTRIBUTES = "hf_slim_"
_CONFIG = "config."
_RESHAPING = ("view", "reshape")


def __getattr__(name: str) -> Any:
    """A model class of transformers that resizes itself when it is built."""
    return _resizing(name)


def resize(model: PreTrainedModel, *, is_whole: bool = True) -> None:
    """Give a freshly built model, and every model in it, the sizes that its config records.

    A part that the model does not have is passed over, and nothing is done twice.

    Args:
        model: The model; changed in place.
        is_whole: Whether all of it is there: a subclass may add layers after the class that it inherits from is done.

    Raises:
        ValueError: If a record is damaged or of a newer version, or does not fit the model.
    """
    # Models are built under a device context, which has Python look at every access to a tensor.
    with torch._C.DisableTorchFunction():
        for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
            record = read_record(part.config)
            if record is not None:
                _apply(part, record, is_whole=is_whole or part is not model)


def is_record(value: Any) -> bool:
    """Whether what stands under the key in a config is a shape record, and not something of somebody else's."""
    return isinstance(value, dict) and ("version" in value or "shapes" in value)


def read_record(config: Any) -> Any:
    """The shape record of a config, checked.

    Args:
        config: The config of a model.

    Returns:
        The record: `version`; the names of the classes of the `model` and its `base` model; `shapes`, the shape of
        every tensor that is smaller than the other fields say; `attributes`, for the names of modules the numbers that
        count units; `infer`, the modules whose code has to infer a width. None if there is no record.

    Raises:
        ValueError: If it is damaged or of a newer version.
    """
    record = config.__dict__.get(RECORD_KEY)
    if not is_record(record):
        return None
    where = _where(config)
    version = record.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"The shape record in {where} is damaged: its version is {version!r}.")
    if version > RECORD_VERSION:
        raise ValueError(
            f"The shape record in {where} is of version {version}, but this hf_slim reads up to {RECORD_VERSION}: "
            "upgrade it with `pip install --upgrade hf-slim`."
        )
    for key, kind in (("shapes", dict), ("attributes", dict), ("infer", list), ("model", str), ("base", str)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"The shape record in {where} is damaged: its {key} are {record.get(key)!r}.")
    for name, shape in record["shapes"].items():
        if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"The shape record in {where} is damaged: it gives {name} the shape {shape!r}.")
    for path, numbers in record["attributes"].items():
        if not isinstance(numbers, dict) or not all(_is_number(value) for value in numbers.values()):
            raise ValueError(f"The shape record in {where} is damaged: it gives {path} the attributes {numbers!r}.")
    if not all(isinstance(path, str) for path in record["infer"]):
        raise ValueError(f"The shape record in {where} is damaged: its infer are {record['infer']!r}.")
    return record


def find_base(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The base model of a model, with its dotted name in it: nothing if it is one itself."""
    base = model.base_model
    return next(((path, module) for path, module in model.named_modules() if module is base), ("", model))


def mark_tensor(module: nn.Module, leaf: str) -> None:
    """Note the shape of a tensor that is about to become smaller, if it is the shape that its config gives it."""
    _note(module, DENSE_SHAPES, leaf, tuple(_find_tensor(module, leaf).shape))


def set_number(module: Any, name: str, value: Any) -> None:
    """Set an attribute that counts units, and note what its config gives it.

    Args:
        module: The module; changed in place. One that reads the number from its config gets a view of the config.
        name: Name of the attribute, `config.` before it where it is the config's.
        value: Its new value.
    """
    _note(module, DENSE_NUMBERS, name, get_number(module, name))
    if not name.startswith(_CONFIG):
        setattr(module, name, value)
        return
    field = name[len(_CONFIG) :]
    if isinstance(module.config, ConfigView):
        module.config.__dict__[field] = value
    else:
        module.config = ConfigView(module.config, **{field: value})


def get_number(module: Any, name: str) -> Any:
    """The value of an attribute that counts units; None if it is only set when units are removed."""
    owner: Any = module
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def set_sizes(module: nn.Module) -> None:
    """Let a layer state the sizes that its weight has."""
    module.__dict__.update(sizes_of(module))


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """What a layer's attributes for its sizes have to be, by its weight.

    Args:
        module: Any module.

    Returns:
        Names and values of the attributes; empty for a module that stores no sizes of its weight.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, Conv1D):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(module, _ConvNd):
        depthwise = module.groups == module.out_channels
        groups = weight.shape[0] if depthwise and module.groups > 1 else module.groups
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * groups, "groups": groups}
    if isinstance(module, nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    return {}


class ConfigView:
    """A config as one module sees it: some fields of its own, all others those of the model's config."""

    def __init__(self, config: Any, **fields: Any) -> None:
        """Look at a config.

        Args:
            config: The model's config.
            **fields: The fields that differ.
        """
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        """Any field that is not its own, read from the model's config."""
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def _apply(model: PreTrainedModel, record: Any, *, is_whole: bool) -> None:
    base_path, base = find_base(model)
    classes = {kind.__name__ for kind in type(model).__mro__}
    missing = []

    def find(name: str) -> Any:
        """The module of a name in the record; None where this class need not have it."""
        outside = name.startswith(OUTSIDE)
        whole = record["model"] in classes
        if outside and not whole and not base_path:  # of a head that this class is not, or a model inside that one
            return None
        module: Any = model if outside else base
        for child in name[len(OUTSIDE) * outside :].split("."):
            module = module if module is None or not child else module._modules.get(child)
        if module is None and (whole or (not outside and type(base).__name__ == record["base"])):
            missing.append(name)
        return module

    tensors = []
    for name, shape in record["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = find(path)
        if module is not None and _find_tensor(module, leaf) is not None:
            tensors.append((module, leaf, tuple(shape)))
        elif module is not None:
            missing.append(name)
    numbers = [(m, values) for path, values in record["attributes"].items() if (m := find(path)) is not None]
    infer = [m for path in record["infer"] if (m := find(path)) is not None]
    if missing and is_whole:
        raise ValueError(
            f"The shape record in {_where(model.config)} names what {type(model).__name__} does not have: "
            f"{', '.join(sorted(set(missing)))}. The config belongs to another model, or was edited."
        )
    for module, leaf, shape in tensors:
        _cut(model, module, leaf, shape)
    for module, values in numbers:
        _set_numbers(module, values, _where(model.config))
    for module in infer:
        infer_widths(module)


def _set_numbers(module: nn.Module, values: dict[str, Any], at: str) -> None:
    for name, value in values.items():
        if not _is_number(get_number(module, name)) and not name.startswith(_OWN_ATTRIBUTES):
            raise ValueError(f"The shape record in {at} does not fit: {type(module).__name__} has no number {name!r}.")
        if get_number(module, name) != value:
            set_number(module, name, value)


def _find_tensor(module: nn.Module, leaf: str) -> Any:
    found = module._parameters.get(leaf)
    return module._buffers.get(leaf) if found is None else found


def _cut(model: PreTrainedModel, module: nn.Module, leaf: str, shape: tuple[int, ...]) -> None:
    tensor: Any = _find_tensor(module, leaf)
    before = tuple(tensor.shape)
    if before == shape:
        return
    if len(before) != len(shape) or any(size > whole for size, whole in zip(shape, before, strict=True)):
        raise ValueError(
            f"The shape record in {_where(model.config)} does not fit: it gives {type(module).__name__}.{leaf} the "
            f"shape {shape}, but the other fields make it {before}."
        )
    _note(module, DENSE_SHAPES, leaf, before)
    data = tensor.data
    if data.is_meta:
        tensor.data = torch.empty(shape, dtype=data.dtype, device="meta")
    else:
        tensor.data = data[tuple(slice(0, size) for size in shape)].clone()
    if leaf == "weight":
        set_sizes(module)


def _note(module: nn.Module, where: str, name: str, value: Any) -> None:
    """Note what a config gives a module, once; a copy of the module keeps what it has noted."""
    noted = module.__dict__.get(where, {})
    if name not in noted:
        module.__dict__[where] = {**noted, name: value}


def _where(config: Any) -> str:
    return f"config.json of {config.name_or_path!r}" if config.name_or_path else "the config"


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


@functools.cache
def _resizing(name: str) -> Any:
    stock: Any = None if name.startswith("_") else getattr(transformers, name, None)
    if not isinstance(stock, type) or not issubclass(stock, PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and transformers has no such model")

    class Resizing(stock):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            text = getattr(config, "sub_configs", {}).get("text_config")
            if text is not None and text is stock.config_class:  # the text part of a larger model, by itself
                config = config.get_text_config()
            super().__init__(config, *args, **kwargs)
            resize(self)

        @classmethod
        def is_custom_code(cls) -> bool:
            """Whether weights are named otherwise than in the stock class: those of older names are renamed, too."""
            return False

    Resizing.__name__ = Resizing.__qualname__ = name
    Resizing.__doc__ = f"`transformers.{name}` of the sizes that its config records."
    return Resizing


# Some attention ends with `attn_output.reshape(batch, length, embed_dim)`, `embed_dim` being the last size of its
# input. With fewer heads there are fewer values, so the number is replaced by -1 in the code: the size that is left,
# which for all heads is the same.


def find_width(function: ast.FunctionDef) -> str | None:
    """Find out whether a method reshapes results to a width that it has from an input.

    Args:
        function: The method's syntax tree.

    Returns:
        How the code writes that width, or None.
    """
    return next((width for _, width in _find_sites(function)), None)


def can_infer(kind: type) -> bool:
    """Whether all those widths in a class can be left to be inferred.

    Args:
        kind: A class of modules.

    Returns:
        True if `infer_widths` works for it.
    """
    known: Any = kind
    return _inferring(known) is not None


def infers_widths(module: nn.Module) -> bool:
    """Whether `infer_widths` has changed a module."""
    return getattr(type(module), "infers_widths", False)


def infer_widths(module: Any) -> None:
    """Make a module infer those widths from then on; its class becomes a subclass that does.

    Args:
        module: The module; changed in place.

    Raises:
        ValueError: If the code of its class is not as it was when the model was slimmed.
    """
    if infers_widths(module):
        return
    written: Any = type(module)
    kind: Any = _inferring(written)
    if kind is None:
        raise ValueError(
            f"The code of {type(module).__name__} in this version of transformers takes only the number of heads that "
            "its config says: load the model with the version that it was saved with."
        )
    module.__class__ = kind


def written_class(kind: type) -> type:
    """The class as it is written in a file: without the subclass that `infer_widths` made.

    Args:
        kind: A class of modules.

    Returns:
        The class itself, or the one that it was made from.
    """
    return kind.__mro__[1] if "infers_widths" in vars(kind) else kind


def root_of(call: ast.Call) -> str | None:
    """The name that a chain of calls begins with: `x` in `x.transpose(0, 1).view(2, 3)`.

    Args:
        call: The last call.

    Returns:
        The name, None if it begins with something else.
    """
    node: ast.AST = call
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def arguments_of(function: ast.FunctionDef) -> set[str]:
    """The names of a method's parameters, without `self`.

    Args:
        function: The method's syntax tree.

    Returns:
        The names.
    """
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {"self"}


@functools.cache
def _inferring(kind: type) -> type | None:
    """The subclass whose methods infer the widths; None if some cannot be inferred."""
    methods: dict[str, Any] = {}
    for function in vars(kind).values():
        if not inspect.isfunction(function):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        if not isinstance(tree.body[0], ast.FunctionDef):
            return None
        sites = [site for site, _ in _find_sites(tree.body[0])]
        if not sites:
            continue
        if any(ast.unparse(size) == "-1" for site in sites for size in _sizes(site)) or "super()" in ast.unparse(tree):
            return None
        for site in sites:
            _sizes(site)[-1] = ast.copy_location(ast.UnaryOp(ast.USub(), ast.Constant(1)), site)
        code = compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")
        exec(code, inspect.unwrap(function).__globals__, methods)
    made = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "infers_widths": True}
    return type(kind.__name__, (kind,), {**methods, **made, "__reduce_ex__": _reduce_inferring})


def _reduce_inferring(module: Any, protocol: int) -> tuple[Any, ...]:
    """How to pickle and copy such a module: by the class that it was made from, which can be imported."""
    return _make_inferring, (type(module).__mro__[1],), module.__dict__


def _make_inferring(kind: type) -> Any:
    made: Any = _inferring(kind)
    return made.__new__(made)


def _sizes(site: ast.Call) -> list[ast.expr]:
    """The sizes that a reshape asks for."""
    last = site.args[-1]
    return last.elts if isinstance(last, (ast.Tuple, ast.List)) else site.args


def _find_sites(function: ast.FunctionDef) -> list[tuple[ast.Call, str]]:
    """The reshapes of results, before the output projection, whose last size is one of an input's; and that size."""
    inputs = arguments_of(function)
    names = set()
    projections = [0]
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            last = node.targets[0].elts[-1]
            if isinstance(last, ast.Name) and ast.unparse(node.value).removesuffix("()") in {
                f"{name}.{size}" for name in inputs for size in ("size", "shape")
            }:
                names.add(last.id)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("self.") and ("out" in called or called.endswith("proj")):
                projections.append(node.lineno)
    found = []
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        late = len(projections) > 1 and node.lineno > max(projections)
        if node.func.attr not in _RESHAPING or root_of(node) in inputs or late or not _sizes(node):
            continue
        last_sizes = {f"{name}.shape[-1]" for name in inputs}
        for part in ast.walk(_sizes(node)[-1]):
            text = ast.unparse(part) if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)) else ""
            of_object = (
                isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id != "self"
            )
            if text in names | last_sizes or (of_object and not text.endswith((".shape", ".size"))):
                found.append((node, text))
                break
    return found
