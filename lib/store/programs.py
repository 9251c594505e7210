"""Networks stored as the list of their operations: what an 8-bit network is, and its file."""

import json
import re

import torch
from torch import fx, nn

# Arithmetic on the batch size, which an exported network may contain.
PYTHON = {f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "getitem")}
NAMESPACES = ("aten", "quantized_decomposed")
TYPES = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


class Program(nn.Module):
    """A network as a list of tensor operations and the tensors that they take.

    Its state dict is the whole network: `program` holds the list as JSON (with the scales and zero
    points of the activations), `network.*` the integer weights, their scales, and the biases. So
    the hash of the state dict covers all of it, and the same file gives the same network, whatever
    made it. Operations of torch alone are admitted: no code in a file is run.

    - state: such a state dict.

    Raises ValueError where it is none.
    """

    def __init__(self, state):
        super().__init__()
        try:
            text = bytes(state["program"].tolist()).decode()
            content = json.loads(text)
            self.shape = tuple(content["shape"])
            tensors = {name.removeprefix("network."): value for name, value in state.items()}
            self.network = fx.GraphModule(tensors, _graph(content["nodes"]), "Network")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"no program of torch operations: {error!r}") from error
        self.register_buffer("program", state["program"])

    def forward(self, x):
        return self.network(x)

    def integers(self):
        """The 8-bit weights."""
        return [tensor for tensor in self.buffers() if tensor.dtype == torch.int8]


def program_of(module, shape):
    """The Program of an exported network (an fx.GraphModule of one input, the images).

    - shape: (channels, height, width) of an image.

    Raises ValueError where the network holds what cannot be stored.
    """
    known = module.state_dict() | dict(module.named_buffers())
    number, nodes, tensors = {}, [], {}
    for node in module.graph.nodes:
        if node.op == "call_module" and not node.users:
            continue  # torch.export's checks of its input
        args = _encode(list(node.args), number)
        if node.op == "placeholder":
            entry = ["input"]
        elif node.op == "get_attr" and node.target in known:
            name = re.sub(r"\W", "_", node.target)
            tensors[f"network.{name}"] = known[node.target].detach().contiguous()
            entry = ["tensor", [name]]
        elif node.op == "output":
            result = args[0][0] if isinstance(args[0], list) else args[0]
            entry = ["output", [result]]
        elif node.op == "call_function":
            entry = [_name(node.target), args, _encode(dict(node.kwargs), number)]
        else:
            raise ValueError(f"the operation {node.op} {node.target} cannot be stored")
        number[node] = len(nodes)
        nodes.append(entry)
    text = json.dumps({"shape": list(shape), "nodes": nodes}, separators=(",", ":"))
    program = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return Program({"program": program} | tensors)


def _graph(entries):
    graph, nodes = fx.Graph(), []
    for name, *rest in entries:
        args, kwargs = ([_decode(part, nodes) for part in rest] + [[], {}][len(rest) :])[:2]
        if name == "input":
            nodes.append(graph.placeholder("images"))
        elif name == "tensor":
            nodes.append(graph.get_attr(*args))
        elif name == "output":
            graph.output(*args)
        else:
            nodes.append(graph.call_function(_operation(name), tuple(args), kwargs))
    graph.lint()
    return graph


def _name(operation):
    """The name under which an operation is stored."""
    if isinstance(operation, torch._ops.OpOverload) and operation.namespace in NAMESPACES:
        if torch.Tag.nondeterministic_seeded in operation.tags:
            raise ValueError(f"the operation {operation} is random, and a vote must not be")
        return str(operation)
    name = f"{getattr(operation, '__module__', '')}.{getattr(operation, '__name__', '')}"
    if name not in PYTHON:
        raise ValueError(f"the operation {operation} cannot be stored")
    return name


def _operation(name):
    """The operation of a name; the names of a file are data, so only those of `_name` are known."""
    # Registers the operations that quantise and dequantise.
    import _operator

    import torch.ao.quantization.fx._decomposed

    if name in PYTHON:
        return getattr(_operator, name.split(".")[1])
    namespace, operation, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise ValueError(f"unknown operation {name}")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


def _encode(value, number):
    """An argument as JSON: {"node": i} is the result of entry i, {"dtype": "int8"} a constant."""
    if isinstance(value, fx.Node):
        return {"node": number[value]}
    if isinstance(value, list | tuple):
        return [_encode(part, number) for part in value]
    if isinstance(value, dict):
        return {name: _encode(part, number) for name, part in value.items()}
    for kind, type_ in TYPES.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the argument {value!r} cannot be stored")


def _decode(value, nodes):
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if isinstance(value, dict) and set(value) == {"node"}:
        return nodes[value["node"]]
    if isinstance(value, dict) and len(value) == 1 and (kind := next(iter(value))) in TYPES:
        constant = getattr(torch, value[kind])
        if not isinstance(constant, TYPES[kind]):
            raise ValueError(f"{value[kind]} is no {kind}")
        return constant
    if isinstance(value, dict):
        return {name: _decode(part, nodes) for name, part in value.items()}
    return value
