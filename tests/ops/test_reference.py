"""The plain reference against what the authors' attention computed."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from authors import CORE, VARIANTS, core_weights, record

from soft_mm.ops import reference


@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_reference_reproduces_authors_attention(kind, regime):
    fixture = record(f'attention_{kind}_{regime}')
    q, v = fixture['q'].double(), fixture['v'].double()
    conv, norm_weight, norm_bias, local = core_weights(regime)
    q = q / 32**0.25
    landmarks = reference.conv_landmarks(q, CORE['grid'], conv, norm_weight, norm_bias)
    normalized = kind == 'norm'
    inverse = reference.newton_inverse_per_image if normalized else reference.newton_inverse
    kernel = reference.gaussian_kernel(landmarks, landmarks)
    out = reference.softmax_free_attention(q, landmarks, v, inverse, normalized)
    torch.testing.assert_close(kernel.float(), fixture['kernel'], rtol=0, atol=1e-5)
    scale = fixture['inverse'].abs().max()
    torch.testing.assert_close(inverse(kernel).float() / scale, fixture['inverse'] / scale, rtol=0, atol=1e-4)
    scale = fixture['out'].abs().max()
    torch.testing.assert_close(out.float() / scale, fixture['out_without_conv'] / scale, rtol=0, atol=1e-4)
    out = out + reference.local_branch(v, CORE['grid'], local)
    torch.testing.assert_close(out.float() / scale, fixture['out'] / scale, rtol=0, atol=1e-4)


def imported(path):
    """Return the packages that a file imports, '' for its siblings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += ['' if node.level else node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split('.')[0] for name in names}


def test_reference_needs_torch_alone_and_ops_nothing_of_the_package():
    folder = Path(reference.__file__).parent
    assert imported(folder / 'reference.py') - sys.stdlib_module_names == {'torch'}
    for path in folder.glob('*.py'):
        assert imported(path) - sys.stdlib_module_names <= {'torch', ''}, path
