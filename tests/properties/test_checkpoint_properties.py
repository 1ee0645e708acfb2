"""Checkpoint files, changed at random: a clear error, or a model with the weights of the file.

In each case no code of the file is run, nothing is written, and a backbone that cannot be loaded stays as it was.
"""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import lzma
import os
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pytest
import torch
from authors import Classifier, Harmful
from hypothesis import assume
from hypothesis import strategies as st
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from properties.strategies import assert_clear, randomize, searched

from soft_mm import SOFT
from soft_mm.checkpoints import convert as convert_module
from soft_mm.checkpoints import from_official, load_weights, to_official
from tools import convert_checkpoint

ARCH = dict(embed_dims=(4, 4, 6, 8), num_heads=(1, 1, 2, 2), depths=(1, 2, 1, 1), ratios=(4, 4, 2, 1))
OPTIONS = dict(arch=ARCH, img_size=64)
PREFIX = 'backbone.'

pytestmark = pytest.mark.filterwarnings(
    'ignore:Detected pickle protocol', 'ignore:TypedStorage is deprecated', 'ignore:Casting complex values'
)

# Events that a reader has no reason to cause. Python cannot remove an audit hook, so it is switched on and off.
_FORBIDDEN = ('os.', 'subprocess.', 'socket.', 'shutil.', 'ctypes.dlopen', 'exec', 'compile', 'pty.', 'webbrowser.')
_HARMLESS = ('os.listdir', 'os.scandir', 'os.walk', 'os.fwalk')
_EVENTS = None


def _audit(event, arguments):
    if _EVENTS is None:
        return
    writes = event == 'open' and (
        isinstance(arguments[1], str)
        and set(arguments[1]) & set('wax+')
        or arguments[1] is None
        and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes or event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        _EVENTS.append((event, arguments))


sys.addaudithook(_audit)
# Pickles of Python 2 need this codec, whose module is run when it is imported.
codecs.lookup('latin-1')


@contextlib.contextmanager
def watched():
    """Check that the block runs no code and writes no file."""
    global _EVENTS
    _EVENTS = []
    try:
        yield
        seen = _EVENTS
    finally:
        _EVENTS = None
    assert not seen


class RenamedInit(PretrainedInit):
    """mmengine's initialiser under another name."""


@functools.cache
def classifier():
    torch.manual_seed(0)
    return randomize(Classifier(SOFT(**OPTIONS, out_type='cls_token'), 5), 0).eval()


@functools.cache
def written(form):
    """The content of a file of the classifier in the form ``'zip'``, ``'legacy'`` or ``'safetensors'``."""
    state_dict = classifier().state_dict()
    if form == 'safetensors':
        safetensors = pytest.importorskip('safetensors.torch')
        return safetensors.save(state_dict, dict(normalized='False'))
    buffer = io.BytesIO()
    content = dict(meta=dict(normalized=False, epoch=3), state_dict=state_dict)
    torch.save(content, buffer, _use_new_zipfile_serialization=form == 'zip')
    return buffer.getvalue()


def load(path, **init_cfg):
    """Load the backbone of a file by ``init_cfg``. Return it, or the error."""
    torch.manual_seed(1)
    model = SOFT(**OPTIONS, init_cfg=dict(dict(type='Pretrained', checkpoint=str(path), prefix=PREFIX), **init_cfg))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with watched():
        try:
            load_weights(path)
            model.init_weights()
        except Exception as error:
            result = error
        else:
            return model.eval()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_clear(result)
    assert isinstance(result, (ValueError, FileNotFoundError))
    return result


@contextlib.contextmanager
def file_of(content, form):
    """A folder with one file. Check that nothing else is written to it, nor to the current folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f'file.{"safetensors" if form == "safetensors" else "pth"}')
        path.write_bytes(content)
        current = os.getcwd()
        os.chdir(folder)
        try:
            yield path
        finally:
            os.chdir(current)
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]
        assert path.read_bytes() == content


FORMS = st.sampled_from(['zip', 'zip', 'legacy', 'safetensors'])
EDITS = ('flip', 'flip', 'flip', 'set', 'cut', 'cut front', 'remove', 'insert', 'zero', 'repeat', 'append', 'compress')


@st.composite
def edits(draw):
    """One to three changes of bytes: what, where (from the start, from the end, or as a share of the file), value."""
    place = st.tuples(
        st.sampled_from(['start', 'end', 'share']), st.integers(0, 15000) | st.integers(0, 200) | st.integers(0, 10**4)
    )
    return draw(st.lists(st.tuples(st.sampled_from(EDITS), place, st.integers(1, 255)), min_size=1, max_size=3))


def edited(content, changes):
    """Apply :func:`edits` to bytes."""
    data = bytearray(content)
    for kind, (origin, offset), value in changes:
        if not data:
            break
        at = {'start': offset, 'end': len(data) - 1 - offset, 'share': offset * len(data) // 10**4}[origin]
        at = min(max(at, 0), len(data) - 1)
        if kind == 'flip':
            data[at] ^= value
        elif kind == 'set':
            data[at] = value
        elif kind == 'cut':
            del data[at:]
        elif kind == 'cut front':
            del data[:at]
        elif kind == 'remove':
            del data[at : at + value]
        elif kind == 'insert':
            data[at:at] = bytes([value]) * (value % 9 + 1)
        elif kind == 'zero':
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif kind == 'repeat':
            data[at:at] = data[at : at + value]
        elif kind == 'append':
            data += bytes([value]) * value
        else:
            compress = (gzip.compress, bz2.compress, lzma.compress)[value % 3]
            data = bytearray(compress(bytes(data), 1) if value % 3 < 2 else compress(bytes(data), preset=0))
    return bytes(data)


@searched(fast=80, long=800, form=FORMS, changes=edits())
def test_damaged_bytes_are_noticed(form, changes):
    """The archive of a zip file has checksums, so any change of a weight is noticed.

    Files in the legacy form and of safetensors have none, so their weights can differ in values.
    """
    content = edited(written(form), changes)
    with file_of(content, form) as path:
        model = load(path)
    if isinstance(model, Exception):
        return
    expected = classifier().backbone.state_dict()
    for key, value in model.state_dict().items():
        assert value.shape == expected[key].shape and value.dtype == expected[key].dtype
        assert form != 'zip' or torch.equal(value, expected[key]), key
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))


SHAPES = {
    'scalar': lambda value: value.flatten()[0],
    'flat': lambda value: value.flatten(),
    'empty': lambda value: value[:0],
    'no columns': lambda value: value[..., :0],
    'half': lambda value: value[: len(value) // 2],
    'transposed': lambda value: value.transpose(0, -1),
    'more dimensions': lambda value: value[None],
    'doubled': lambda value: torch.cat([value, value], -1),
    'flipped view': lambda value: value.flip(0).T.T if value.ndim == 2 else value.flip(0),
}
DTYPES = {
    **{str(dtype): dtype for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8)},
    **{str(dtype): dtype for dtype in (torch.bool, torch.complex64, torch.uint8)},
}
KINDS = {
    'list': lambda value: value.tolist(),
    'array': lambda value: value.numpy(),
    'dict': lambda value: dict(weight=value),
    'tuple': lambda value: (value,),
    'None': lambda value: None,
    'text': lambda value: 'weight',
    'number': lambda value: 3,
    'parameter': lambda value: torch.nn.Parameter(value) if value.is_floating_point() else value,
    'sparse': lambda value: value.to_sparse(),
    'meta': lambda value: value.to('meta'),
    'quantized': lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    'function': lambda value: functools.partial,
}
WRAPPERS = {
    'bare': lambda state_dict: state_dict,
    'state_dict': lambda state_dict: dict(state_dict=state_dict),
    'runner': lambda state_dict: dict(
        state_dict=state_dict, meta=dict(epoch=1, seed=None), optimizer=dict(state={0: dict(step=1)}, param_groups=[{}])
    ),
    'ordered': lambda state_dict: OrderedDict(state_dict=OrderedDict(state_dict), meta=OrderedDict()),
    'twice': lambda state_dict: dict(state_dict=dict(state_dict=state_dict)),
    'list': lambda state_dict: dict(state_dict=list(state_dict.items())),
    'list of one': lambda state_dict: [dict(state_dict=state_dict)],
    'no dict': lambda state_dict: dict(state_dict=None),
    'text': lambda state_dict: dict(state_dict='weights.pth'),
    'tensor': lambda state_dict: next(iter(state_dict.values()), None),
    'odd meta': lambda state_dict: dict(state_dict=state_dict, meta=[1, 2]),
    'odd key': lambda state_dict: {3: 4, 'state_dict': {**state_dict, 5: torch.ones(1)}},
}
NAMES = (
    *('module.', 'stages', 'stages.', 'backbone.', 'backbone.stages.9.pos_embed', 'backbone.stages.0.blocks.7.x', ''),
    *('block1.0.att', 'backbone.stages.0.pos_embed.', 'backbone.extra', 'head.fc.weight', 'state_dict', 'ä', '\0'),
)


@st.composite
def content_changes(draw):
    """One to three changes of a state dict: what, of which key, and how."""
    kinds = dict(drop=[''], rename=NAMES, add=NAMES, shape=SHAPES, dtype=DTYPES, kind=KINDS)
    changes = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(list(kinds)))
        key = draw(st.integers(0, 200) | st.sampled_from(['pos_embed', 'qv', 'local', 'running_var', 'num_batches']))
        changes.append((kind, key, draw(st.sampled_from(list(kinds[kind])))))
    return changes


def change_content(state_dict, changes):
    """Apply :func:`content_changes`. Skip a change that is impossible, such as the transpose of a scalar."""
    state_dict = {key: value.clone() for key, value in state_dict.items()}
    for kind, which, how in changes:
        keys = [key for key in state_dict if isinstance(which, int) or which in str(key)]
        if not keys:
            continue
        key = keys[which % len(keys) if isinstance(which, int) else 0]
        value = state_dict[key]
        # NumPy, whose array an earlier change may have put there, raises ValueError.
        with contextlib.suppress(AttributeError, TypeError, IndexError, RuntimeError, ValueError):
            if kind == 'drop':
                del state_dict[key]
            elif kind == 'rename':
                state_dict[how] = state_dict.pop(key)
            elif kind == 'add':
                state_dict[how] = value
            elif kind == 'shape':
                state_dict[key] = SHAPES[how](value)
            elif kind == 'dtype':
                state_dict[key] = value.to(DTYPES[how])
            else:
                state_dict[key] = KINDS[how](value)
    return state_dict


def save(content, form='zip'):
    """Return the content of a file. Skip the case if safetensors cannot hold it."""
    if form == 'safetensors':
        safetensors = pytest.importorskip('safetensors.torch')
        try:
            return safetensors.save({key: value.contiguous() for key, value in content.items()})
        except Exception:
            assume(False)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=form == 'zip')
    return buffer.getvalue()


def assert_weights_of_the_file(model, state_dict):
    """Check that a model has the weights of a state dict, converted to its dtypes and resized to its grids."""
    for key, value in model.state_dict().items():
        found = state_dict[f'{PREFIX}{key}']
        assert isinstance(found, torch.Tensor) and not found.is_complex(), key
        if found.shape != value.shape:
            assert key.endswith('.pos_embed') and found.ndim == 4, key
            wide = found if found.dtype == torch.float64 else found.float()
            found = torch.nn.functional.interpolate(wide, value.shape[-2:], mode='bilinear')
        assert torch.equal(value, found.to(value.dtype)), key


@searched(
    fast=80,
    long=800,
    changes=content_changes(),
    wrapper=st.sampled_from(['bare', 'state_dict', 'runner', *WRAPPERS]),
    form=FORMS,
)
def test_changed_contents_are_refused_or_loaded_as_they_are(changes, wrapper, form):
    state_dict = change_content(classifier().state_dict(), changes)
    # A file of safetensors holds nothing but the weights.
    wrapper = 'bare' if form == 'safetensors' else wrapper
    with file_of(save(WRAPPERS[wrapper](state_dict), form), form) as path:
        model = load(path)
    if not isinstance(model, Exception):
        assert_weights_of_the_file(model, state_dict)
    elif not changes:
        assert wrapper not in ('bare', 'state_dict', 'runner', 'ordered', 'odd meta'), model


PLACES = {
    'value': lambda state_dict, harmful: {**state_dict, 'extra': harmful},
    'weight': lambda state_dict, harmful: {**state_dict, next(iter(state_dict)): harmful},
    'beside': lambda state_dict, harmful: dict(state_dict=state_dict, optimizer=harmful),
    'meta': lambda state_dict, harmful: dict(state_dict=state_dict, meta=dict(config=[1, (2, harmful)])),
    'attribute': lambda state_dict, harmful: dict(state_dict=with_attribute(state_dict, harmful)),
    'whole': lambda state_dict, harmful: harmful,
}


def with_attribute(state_dict, harmful):
    ordered = OrderedDict(state_dict)
    ordered._metadata = harmful
    return ordered


@searched(
    fast=15,
    long=150,
    changes=content_changes(),
    place=st.sampled_from(list(PLACES)),
    legacy=st.booleans(),
    protocol=st.sampled_from([2, 3, 4, 5]),
)
def test_code_is_refused_wherever_it_is(changes, place, legacy, protocol):
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace')
        buffer = io.BytesIO()
        content = PLACES[place](change_content(classifier().state_dict(), changes), Harmful(trace))
        torch.save(content, buffer, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
        with file_of(buffer.getvalue(), 'pth') as path:
            assert isinstance(load(path), ValueError)
        assert not trace.exists()


def convert(path, target, *options):
    """Run the converter. Return None, or the text of its error."""
    with mock.patch.object(sys, 'argv', ['convert_checkpoint.py', str(path), str(target), *options]):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            try:
                convert_checkpoint.main()
            except SystemExit as error:
                assert error.code == 2
                return printed.getvalue()
    return None


@searched(
    fast=40,
    long=400,
    changes=content_changes(),
    wrapper=st.sampled_from(['bare', 'state_dict', 'model', 'list', 'no dict']),
    options=st.lists(st.sampled_from(['--normalized', '--backbone-only', '--weights=raw']), unique=True),
    safetensors=st.booleans(),
)
def test_a_changed_file_of_the_authors_is_refused_or_converted(changes, wrapper, options, safetensors):
    official = change_content(to_official(classifier().state_dict()), changes)
    content = dict(model=official) if wrapper == 'model' else WRAPPERS[wrapper](official)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'source.pth'), Path(folder, f'target.{"safetensors" if safetensors else "pth"}')
        source.write_bytes(save(content))
        said = convert(source, target, *options)
        if said is not None:
            assert 'error: ' in said and 'Traceback' not in said
            assert [entry.name for entry in Path(folder).iterdir()] == ['source.pth']
            assert changes or wrapper in ('list', 'no dict') or options, said
            return
        assert sorted(entry.name for entry in Path(folder).iterdir()) == ['source.pth', target.name]
        converted = load_weights(target)['state_dict']
    expected = from_official({key.removeprefix('module.'): value for key, value in official.items()})
    for key, value in converted.items():
        assert torch.equal(value, expected[key]), key
    left = {key for key in expected if key not in converted}
    assert not left or '--backbone-only' in options and all(key.startswith('head.') for key in left)


def record_of(content, name):
    """Return the place of the data of a record in an archive of ``torch.save``."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(name))
    start = info.header_offset
    names = int.from_bytes(content[start + 26 : start + 28], 'little')
    return start + 30 + names + int.from_bytes(content[start + 28 : start + 30], 'little')


def flipped(content, place, bits):
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


DAMAGED = {
    # The checksum of the record is wrong, which torch.load does not notice.
    'flipped weight': lambda: flipped(written('zip'), record_of(written('zip'), '/data/2') + 3, 0x40),
    'flipped directory': lambda: flipped(written('zip'), written('zip').rfind(b'PK\1\2'), 1),
    'several disks': lambda: edited(written('zip'), [('flip', ('start', 0), 1), ('flip', ('end', 22), 1)]),
    'cut gzip': lambda: gzip.compress(written('zip'))[:500],
    'start of gzip': lambda: b'\x1f\x8b',
}


@pytest.mark.parametrize('name', DAMAGED)
def test_damage_that_was_not_noticed(name):
    with file_of(DAMAGED[name](), 'zip') as path:
        assert isinstance(load(path), ValueError)


@pytest.mark.parametrize(
    ('key', 'change'),
    [
        ('stages.0.pos_embed', lambda value: value.flatten()),
        ('stages.0.pos_embed', lambda value: value[..., :0, :0]),
        # Resizing must not round to integers.
        ('stages.0.pos_embed', lambda value: torch.tensor([0, 1, 0]).expand(1, 4, 3, 3)),
        ('stages.0.pos_embed', lambda value: value[..., :3, :3].to(torch.complex64)),
        ('stages.0.pos_embed', lambda value: value.to(torch.complex64)),
        ('stages.1.blocks.0.mlp.fc1.weight', KINDS['sparse']),
        ('stages.1.blocks.0.mlp.fc1.weight', KINDS['meta']),
        ('stages.1.blocks.0.mlp.fc1.weight', KINDS['quantized']),
    ],
    ids=['flat', 'empty', 'integers', 'complex, resized', 'complex', 'sparse', 'meta', 'quantized'],
)
def test_a_weight_that_was_not_refused_clearly(key, change):
    state_dict = dict(classifier().state_dict())
    state_dict[f'{PREFIX}{key}'] = change(state_dict[f'{PREFIX}{key}'])
    with file_of(save(state_dict), 'zip') as path:
        model = load(path)
    if not isinstance(model, Exception):
        assert_weights_of_the_file(model, state_dict)


@pytest.mark.parametrize(
    'init_cfg',
    [
        lambda path: dict(type='torch.load', f=path, weights_only=False),
        lambda path: dict(type='mmengine.runner.load_checkpoint', model=None, filename=path),
    ],
    ids=['torch.load', 'load_checkpoint'],
)
def test_functions_are_no_initialisers(init_cfg, tmp_path):
    trace, path = tmp_path / 'trace', tmp_path / 'harmful.pth'
    torch.save(dict(state_dict=classifier().state_dict(), extra=Harmful(trace)), path)
    with pytest.raises(ValueError, match='a function'):
        SOFT(**OPTIONS, init_cfg=init_cfg(str(path))).init_weights()
    assert not trace.exists()


def test_contents_that_hold_themselves_are_read(tmp_path):
    """Lists of lists that would be visited 10 ** 10 times, and one that holds itself."""
    nested = [classifier().state_dict()['backbone.stages.0.pos_embed']]
    for _ in range(10):
        nested = [nested] * 10
    nested.append(nested)
    path = tmp_path / 'nested.pth'
    torch.save(dict(state_dict=classifier().state_dict(), other=nested), path)
    assert isinstance(load(path), SOFT)


def test_integer_embeddings_are_not_rounded_by_a_resize():
    state_dict = dict(classifier().backbone.state_dict())
    value = torch.tensor([0, 1, 0]).expand(1, 4, 3, 3)
    state_dict['stages.0.pos_embed'] = value
    model = SOFT(**OPTIONS)
    model.load_state_dict(state_dict)
    expected = torch.nn.functional.interpolate(value.float(), model.stages[0].pos_embed.shape[-2:], mode='bilinear')
    assert torch.equal(model.stages[0].pos_embed, expected)


def test_a_prefix_that_is_no_text():
    with file_of(written('zip'), 'zip') as path:
        assert isinstance(load(path, prefix=3), ValueError)


@pytest.mark.parametrize('address', ['http://[x', 'https://'])
def test_an_address_that_is_none(address):
    with pytest.raises(ValueError) as caught:
        load_weights(address)
    assert_clear(caught.value)


@pytest.mark.parametrize(
    'init_cfg',
    [
        dict(type='mmengine.Pretrained'),
        dict(type='mmengine.model.PretrainedInit'),
        dict(type='Constant', val=0, layer='Conv2d', override=dict(type='Pretrained', name='stages')),
        dict(type=PretrainedInit),
        dict(type='RenamedInit'),
        dict(type=functools.partial(PretrainedInit)),
    ],
    ids=str,
)
def test_code_is_refused_however_the_initialisation_is_named(init_cfg, tmp_path):
    WEIGHT_INITIALIZERS.register_module('RenamedInit', force=True, module=RenamedInit)
    trace, path = tmp_path / 'trace', tmp_path / 'harmful.pth'
    torch.save(dict(state_dict=classifier().state_dict(), extra=Harmful(trace)), path)
    (init_cfg.get('override') or init_cfg)['checkpoint'] = str(path)
    with pytest.raises(ValueError):
        SOFT(**OPTIONS, init_cfg=init_cfg).init_weights()
    assert not trace.exists()


@pytest.mark.parametrize(
    'changes',
    [
        [('shape', 'pos_embed1', 'empty')],
        [('shape', 'pos_embed1', 'no columns')],
        [('kind', 'pos_embed1', 'sparse')],
        [('kind', 'W_q.weight', 'sparse')],
        [('kind', 'W_q.weight', 'meta')],
        [('dtype', 'W_q.weight', 'torch.complex64')],
    ],
    ids=str,
)
def test_a_file_of_the_authors_that_was_not_refused_clearly(changes):
    test_a_changed_file_of_the_authors_is_refused_or_converted.check(changes, 'bare', [], False)


def test_the_number_of_a_block_builds_no_blocks():
    """A name must not decide how much is built."""
    official = to_official(classifier().state_dict())
    official = {key.replace('block2.1.', f'block2.{10**5}.'): value for key, value in official.items()}
    depths = []

    def build(arch, **options):
        depths.append(max(arch['depths']))
        assert max(depths) < 100
        return SOFT(arch, **options)

    build.arch_zoo = SOFT.arch_zoo
    with mock.patch('soft_mm.checkpoints.convert.SOFT', build), pytest.raises(ValueError) as caught:
        convert_module.convert_checkpoint(official)
    assert_clear(caught.value)
