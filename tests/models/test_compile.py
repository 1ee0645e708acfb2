"""The backbone under ``torch.compile``: whole graphs, equal to eager, forward and backward."""

import copy
import sys

import pytest
import torch

from soft_mm import SOFT
from soft_mm.ops import blockwise

ARCH = dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 2, 2), depths=(1, 1, 1, 1))
ATTENTIONS = {
    'default': dict(newton_iterations=3),
    'normalized': dict(newton_iterations=3, normalized=True),
    'bounded': dict(solver='cholesky', max_landmarks=3),
    'bounded-normalized': dict(solver='cholesky', max_landmarks=3, normalized=True),
}
# The same graphs run with and without code being generated for them; to generate it takes long.
TRAININGS = [
    *((name, 'aot_eager') for name in ATTENTIONS),
    pytest.param('bounded-normalized', 'inductor', marks=pytest.mark.long),
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Few tokens at a time, so that small images need several blocks; nothing compiled for the next test."""
    monkeypatch.setitem(blockwise._CHUNK_ENTRIES, 'cpu', 200)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def relative_error(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize(
    'attention',
    [
        # That of the dense configs; the others take long.
        pytest.param(value, marks=[] if name == 'bounded-normalized' else pytest.mark.long, id=name)
        for name, value in ATTENTIONS.items()
    ],
)
@pytest.mark.skipif(sys.platform != 'linux', reason='the default backend needs a C++ compiler')
def test_compiled_evaluation_equals_eager(attention):
    torch.manual_seed(0)
    backbone = SOFT(ARCH, attention=attention).eval()
    image = torch.rand(1, 3, 68, 100)
    with torch.no_grad():
        wanted = backbone(image)
        found = torch.compile(backbone, fullgraph=True, dynamic=False)(image)
    assert all(relative_error(*pair) < 1e-4 for pair in zip(found, wanted))


def test_compiled_graph_has_the_operator_that_works_in_chunks():
    """An export has standard operators instead, which hold the kernel matrix whole."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backbone = SOFT(ARCH, attention=ATTENTIONS['bounded']).eval()
    with torch.no_grad():
        torch.compile(backbone, fullgraph=True, dynamic=False, backend=record)(torch.rand(1, 3, 68, 100))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum('blockwise_forward' in name for name in names) == 3, names


def test_random_landmarks_compile():
    backbone = SOFT(ARCH, attention=dict(sampler='random')).train()
    torch.compile(backbone, backend='aot_eager')(torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize(('attention', 'backend'), TRAININGS)
def test_compiled_training_equals_eager(attention, backend):
    torch.manual_seed(0)
    backbone = SOFT(ARCH, attention=ATTENTIONS[attention])
    other = copy.deepcopy(backbone)
    image = torch.rand(2, 3, 68, 100)
    outputs = []
    for model in (backbone, torch.compile(other, fullgraph=True, dynamic=False, backend=backend)):
        maps = model(image)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x).sin()).sum() for x in maps).backward()
        outputs.append(maps)
    assert all(relative_error(*pair) < 1e-4 for pair in zip(*outputs))
    largest = max(parameter.grad.abs().max() for parameter in backbone.parameters() if parameter.grad is not None)
    for (name, mine), theirs in zip(other.named_parameters(), backbone.parameters()):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            # A convolution's bias before BatchNorm has no gradient but rounding errors.
            scale = theirs.grad.abs().max().clamp(min=1e-3 * largest)
            assert (mine.grad - theirs.grad).abs().max() < 2e-3 * scale, name


@pytest.mark.parametrize('two_sets', [False, True])
@pytest.mark.parametrize('inverted', [False, True])
def test_operators_describe_themselves(inverted, two_sets):
    """What a compiler is told of the operators, shapes and strides, is what they return."""
    if not hasattr(torch.library, 'custom_op'):
        pytest.skip('PyTorch before 2.4 compiles the loops themselves')
    q, v, grad = (torch.randn(2, 11, 3, 4).transpose(1, 2) for _ in range(3))
    landmarks, matrix = torch.randn(2, 3, 5, 4), torch.eye(5).repeat(2, 3, 1, 1)
    optional = ()
    if two_sets:
        # Fewer keys than queries, and wider values.
        k, v = (torch.randn(2, 7, 3, width).transpose(1, 2) for width in (4, 6))
        grad = torch.randn(2, 11, 3, 6).transpose(1, 2)
        optional = (k, torch.tensor([[[1.0, 0, 1, 1, 1]], [[0, 1, 1, 1, 0]]]))
    args = (q, landmarks, v, torch.linalg.cholesky(matrix), inverted)
    checks = ('test_schema', 'test_faketensor')
    operators = torch.ops.soft_mm
    torch.library.opcheck(operators.blockwise_forward, (*args, *optional), test_utils=checks)
    _, gathered, weights = operators.blockwise_forward(*args, *optional)
    args = (grad, *args[:4], gathered, weights, *args[4:], *optional)
    torch.library.opcheck(operators.blockwise_backward, args, test_utils=checks)
