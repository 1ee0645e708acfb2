"""The key map between the authors' state dicts and ours, over the full key lists of every arch."""

import pytest
import torch
from authors import Classifier, official_models

from soft_mm import SOFT
from soft_mm.checkpoints import from_official, to_official


def empty_state_dict(arch):
    return {key: torch.empty(shape, device='meta') for key, shape in official_models()[arch]['keys'].items()}


@pytest.mark.parametrize('arch', ['tiny', 'small', 'small_code', 'medium', 'large', 'huge'])
def test_every_key_is_mapped_and_every_parameter_reached(arch):
    facts = official_models()[arch]
    built = {key: tuple(facts[key]) for key in ('embed_dims', 'num_heads', 'depths')} if arch == 'small_code' else arch
    with torch.device('meta'):
        model = Classifier(SOFT(built, out_type='cls_token'), 1000)
    ours = from_official(empty_state_dict(arch))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == facts['params']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda d: d.update({'block1.0.att.mha.W_k.weight': torch.empty(0)}), 'W_k.weight'),
        (lambda d: d.update({'layers.0.weight': torch.empty(0)}), 'layers.0.weight'),
        (lambda d: d.pop('block2.0.att.mha.W_v.bias'), 'stacked from 2'),
        (lambda d: d.update(pos_embed1=torch.empty(1, 3137, 64)), 'pos_embed1.*3137 positions'),
        (lambda d: d.update(pos_embed4=torch.empty(64)), 'pos_embed4. has the shape'),
        (
            lambda d: d.update({'block1.0.att.mha.W_q.weight': torch.empty(64, 3)}),
            'whose shapes .* do not fit together',
        ),
        (lambda d: d.update({'block4.0.attn.q.bias': torch.tensor(1.0)}), 'whose shapes .* do not fit together'),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    official = empty_state_dict('tiny')
    change(official)
    with pytest.raises(ValueError, match=message):
        from_official(official)


def test_foreign_key_of_ours_is_named():
    with pytest.raises(ValueError, match='neck.weight'):
        to_official({'neck.weight': torch.empty(0)})
