"""The authors' models as recorded in ``tests/data``: weights by rule, inputs, outputs, gradients."""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from soft_mm import SOFT
from soft_mm.checkpoints import from_official, to_official

DATA = Path(__file__).parent / 'data'
VARIANTS = [(kind, regime) for kind in ('plain', 'norm') for regime in ('sharp', 'flat')]
REDUCED_ARCH = dict(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1))
NUM_CLASSES = 10

# The attention core of the fixtures `attention_*`: 2 heads of 32 on a grid of 24x20.
CORE = dict(grid=(24, 20), module=dict(embed_dims=64, num_heads=2, ratio=4, conv_size=5))


def weight(key, shape, regime):
    """The value of one tensor of the authors' state dict by the rule of the fixtures, as float32, float64 or int64.

    Products and quotients with numbers of NumPy are of float64, and stayed so in the authors' run in float64.
    """
    if 'num_batches_tracked' in key:
        return torch.ones(shape, dtype=torch.int64)
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if 'running_var' in key:
        value = 1 + 0.2 * np.abs(r)
    elif 'running_mean' in key:
        value = 0.1 * r
    elif len(shape) >= 2 and 'pos_embed' not in key and 'cls_token' not in key:
        value = r.astype(np.float64) / np.sqrt(np.prod(shape[1:]))
    elif key.endswith('weight'):
        value = 1 + 0.1 * r
    elif 'pos_embed' in key or 'cls_token' in key:
        value = 0.1 * r
    else:
        value = 0.05 * r
    if regime == 'flat' and key.endswith(('Qnorm_act.0.weight', 'W_q.weight', 'W_q.bias')):
        value = 0.7 * value.astype(np.float64)
    return torch.from_numpy(np.asarray(value))


def core_weights(regime):
    """Landmark convolution, LayerNorm weight and bias, local filters of the attention core, in float64."""
    shapes = {
        'Qlandmark_op.weight': (32, 32, 4, 4),
        'Qnorm_act.0.weight': (32,),
        'Qnorm_act.0.bias': (32,),
        'conv.weight': (2, 1, 5, 5),
    }
    return [weight(key, shape, regime).double() for key, shape in shapes.items()]


def image(height, width):
    """The input image ``(1, 3, height, width)``."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, height, width)).astype(np.float32))


@cache
def record(name):
    """The arrays of ``tests/data/<name>.npz``."""
    with np.load(DATA / f'{name}.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@cache
def gradient_norms(kind, regime):
    return json.loads((DATA / f'reduced_{kind}_{regime}_gradnorms_160x256.json').read_text())


@cache
def official_models():
    """By arch: ``embed_dims``, ``num_heads``, ``depths``, ``params`` and the shapes of all ``keys``."""
    return json.loads((DATA / 'official_state_dicts.json').read_text())


class Classifier(torch.nn.Module):
    """The names of mmpretrain's ImageClassifier, without mmpretrain."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Module()
        self.head.fc = torch.nn.Linear(backbone.arch['embed_dims'][3], num_classes)

    def forward(self, x):
        return self.head.fc(self.backbone(x)[-1])


def reduced_model(kind, regime, dtype=torch.float32, **kwargs):
    """The reduced classifier with the weights of the fixtures, in evaluation mode."""
    attention = dict(normalized=kind == 'norm', **kwargs.pop('attention', {}))
    model = Classifier(SOFT(REDUCED_ARCH, attention=attention, out_type='cls_token', **kwargs), NUM_CLASSES)
    shapes = {key: tuple(value.shape) for key, value in to_official(model.state_dict()).items()}
    model.to(dtype).load_state_dict(from_official({key: weight(key, shape, regime) for key, shape in shapes.items()}))
    return model.eval()


class Harmful:
    """Touches a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
