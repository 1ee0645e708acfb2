"""Export of trained models to ONNX, with a check against the toolbox's own predictions."""

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import list_from_file
from torch import nn

from soft_mm.image_models import OUTPUTS, ImageModel, image_model
from soft_mm.inference import load_with_content, read_image
from soft_mm.models.arch import MIN_SIDE
from soft_mm.onnx_model import TOOLBOXES, OnnxModel, data_sample, import_extra
from soft_mm.ops.checks import check_choice
from soft_mm.ops.recording import CAN_EXPORT
from soft_mm.utils import atomic_path, inner_dataset
from soft_mm.version import __version__

DYNAMIC = ('none', 'batch', 'all')
INPUT_DTYPES = ('float32', 'uint8')
# Largest differences to PyTorch that the check accepts.
MAX_PROBABILITY_ERROR = 1e-3
MAX_LOGIT_ERROR = 1e-3
MAX_SCORE_ERROR = 1e-3
# In pixels.
MAX_BOX_ERROR = 0.1
MIN_MATCHED = 0.99
MIN_MASK_IOU = 0.99


def export_onnx(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    shape: Sequence[int],
    dynamic: str = 'none',
    input_dtype: str = 'float32',
    images: Sequence[str] = (),
    check: bool = True,
    force: bool = False,
) -> list[str]:
    """Export a trained model to ONNX, from images to predictions.

    The input ``image`` is RGB, 0 to 255, ``(N, 3, H, W)``. The classes of :mod:`soft_mm.image_models` describe the
    outputs. The metadata of the file are described at :func:`describe`.

    Args:
        config (str | Path): Config file of mmpretrain, mmdet or mmsegmentation.
        checkpoint (str | Path): File of its checkpoint, or http or https address.
        out (str | Path): File to write, ``.onnx``.
        shape (tuple[int, int]): Height and width of the images in pixels, at least 32.
        dynamic (str): ``'none'``: one image of this size. ``'batch'``: any number of images. ``'all'``: any number and
            any size from 32 pixels. Defaults to ``'none'``.
        input_dtype (str): ``'float32'`` or ``'uint8'``. Defaults to ``'float32'``.
        images (Sequence[str]): Image files for the check, each of which is compared. Defaults to (): a photograph that
            matplotlib has.
        check (bool): Compare the file, run by onnxruntime, with the toolbox's predictions. Defaults to True.
        force (bool): Replace an existing file. Defaults to False.

    Returns:
        list[str]: One line per comparison, empty without ``check``.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If an argument is out of its range, a package is missing, the model cannot be exported, or the file
            does not match the toolbox's predictions. Then no file is written.
    """
    check_choice('dynamic', dynamic, DYNAMIC)
    check_choice('input_dtype', input_dtype, INPUT_DTYPES)
    height, width = shape
    if min(shape) < MIN_SIDE:
        raise ValueError(f'shape of {height}x{width} pixels: expected both sides >= {MIN_SIDE}')
    out = Path(out)
    if out.suffix != '.onnx':
        raise ValueError(f'{out}: expected a file name that ends in .onnx')
    if not out.parent.is_dir():
        raise ValueError(f'the folder {out.parent} does not exist: make it first')
    if out.exists() and not force:
        raise ValueError(f'{out} exists: give another name, or --force')
    import_extra('onnx', 'onnxscript', *['onnxruntime'] * check)
    if not CAN_EXPORT:
        raise ValueError(f'PyTorch {torch.__version__} is too old to export: install 2.7 or newer')
    cfg, model, content = load_with_content(config, checkpoint)
    _check_reading(cfg)
    wrapped = image_model(model).eval()
    metadata = describe(wrapped, class_names(cfg, content), (height, width), dynamic)
    for image in images if check else ():
        read_image(image)
    with atomic_path(out) as temporary:
        program = _to_onnx(wrapped, (height, width), dynamic, input_dtype)
        program.model.metadata_props['soft_mm'] = json.dumps(metadata)
        program.save(temporary, external_data=False)
        return check_onnx(model, temporary, shape, dynamic, images) if check else []


def _check_reading(cfg: Config) -> None:
    """Refuse a data set that gives images in memory, whose order of channels is not known."""
    data = inner_dataset(cfg.get('test_dataloader'))
    types = [str(getattr(step.get('type'), '__name__', step.get('type'))) for step in data.get('pipeline', [])]
    if types and not any('LoadImage' in name for name in types):
        raise ValueError(
            'the test pipeline of the config has no LoadImageFromFile, so the order of the colour channels is not '
            'known: export with a config whose images come from files'
        )


def describe(
    model: ImageModel, meta: Mapping[str, Any], shape: tuple[int, int], dynamic: str = 'none'
) -> dict[str, Any]:
    """Collect the metadata of an exported file.

    Args:
        model (ImageModel): The exported function.
        meta (dict): See :func:`class_names`.
        shape (tuple[int, int]): Height and width in pixels for which the file is made.
        dynamic (str): See :func:`export_onnx`. Defaults to ``'none'``.

    Returns:
        dict: Metadata of the file: the task; the names of the outputs; the classes and their palette; the form of the
        input, its size and what may vary; the RGB mean and deviation of the normalisation, which is in the graph; and
        the threshold of masks.

    Raises:
        ValueError: If the data set and the head have different numbers of classes.
    """
    count = number_of_classes(model)
    classes = meta.get('classes') or [str(index) for index in range(count)]
    if len(classes) != count:
        raise ValueError(
            f'the data set of the config has {len(classes)} classes and the head {count}: correct num_classes or '
            'metainfo'
        )
    roi_cfg = getattr(getattr(model.model, 'roi_head', None), 'test_cfg', None) or {}
    return dict(
        task=model.task,
        outputs=OUTPUTS[model.task],
        classes=list(classes),
        palette=[list(colour) for colour in meta['palette']] if meta.get('palette') else None,
        input='RGB, 0 to 255, (N, 3, H, W)',
        shape=list(shape),
        dynamic=dynamic,
        mean=(model.mean.flip(1) if model.flip else model.mean).flatten().tolist(),
        std=(model.std.flip(1) if model.flip else model.std).flatten().tolist(),
        mask_threshold=roi_cfg.get('mask_thr_binary', 0.5),
        soft_mm_version=__version__,
    )


def class_names(cfg: Config, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Find the names and colours of the classes, without opening the files of the data set.

    They come from the checkpoint, in which mmengine's runner records the training data, or else from the test data set
    of the config.

    Args:
        cfg (Config): Config of a toolbox.
        checkpoint (dict): Content of the checkpoint.

    Returns:
        dict: With ``classes``, ``palette`` or neither.
    """
    meta = checkpoint.get('meta')
    recorded = meta.get('dataset_meta') if isinstance(meta, dict) else None
    if isinstance(recorded, dict) and recorded.get('classes'):
        return recorded
    data, scope = inner_dataset(cfg.get('test_dataloader')), cfg.get('default_scope')
    registry = importlib.import_module(f'{scope}.registry').DATASETS
    importlib.import_module(f'{scope}.datasets')
    kind = data.get('type', '')
    kind = registry.get(kind) if isinstance(kind, str) else kind
    given = dict(data.get('metainfo') or {})
    if data.get('classes'):
        given.setdefault('classes', data['classes'])
    if isinstance(given.get('classes'), str):
        given['classes'] = list_from_file(given['classes'])
    known = getattr(kind, 'METAINFO', {})
    if given.get('classes') and 'palette' not in given and 'palette' in known:
        # A subset of the classes keeps their colours.
        colours = dict(zip(known['classes'], known['palette']))
        given['palette'] = (
            [colours[name] for name in given['classes']] if set(given['classes']) <= set(colours) else None
        )
    return {**known, **given}


def check_task(model: OnnxModel, cfg: Config) -> None:
    """Check that an ONNX file does the task of a config, with the same classes in the same order.

    Args:
        model (OnnxModel): The file.
        cfg (Config): Config whose data should evaluate it.

    Raises:
        ValueError: If the toolbox or the classes differ.
    """
    if TOOLBOXES[model.task] != cfg.get('default_scope'):
        raise ValueError(f'{model.file} is for {model.task}, but the config is one of {cfg.get("default_scope")}')
    classes = list(class_names(cfg, {}).get('classes') or model.classes)
    if classes != model.classes:
        raise ValueError(
            f'{model.file} has the classes {model.classes[:3]}..., but the data set of the config has {classes[:3]}...'
        )


def number_of_classes(model: ImageModel) -> int:
    """Return how many classes an exported function tells apart.

    Args:
        model (ImageModel): The function.

    Returns:
        int: Number of classes.
    """
    toolbox_model: Any = model.model
    if model.task == 'classification':
        return toolbox_model.head.num_classes
    if model.task == 'segmentation':
        return toolbox_model.out_channels
    return (toolbox_model.roi_head if hasattr(toolbox_model, 'roi_head') else toolbox_model).bbox_head.num_classes


def _to_onnx(model: ImageModel, shape: tuple[int, int], dynamic: str, input_dtype: str) -> Any:
    # Two images, because an example of one image would make the batch a constant.
    batch = 1 if dynamic == 'none' else 2
    if dynamic == 'all':
        # Sides of 1 on a coarse level would become constants, and equal sides one variable.
        shape = (max(shape[0], 320), max(shape[1], 320) + 64)
    example = torch.randint(0, 256, (batch, 3, *shape), dtype=torch.uint8).to(getattr(torch, input_dtype))
    dims = {'none': {}, 'batch': {0: 'batch'}, 'all': {0: 'batch', 2: 'height', 3: 'width'}}[dynamic]
    options: dict[str, Any] = dict(input_names=['image'], output_names=list(OUTPUTS[model.task]), dynamo=True)
    # torch.onnx knows the operators of torchvision only if it is imported before.
    importlib.import_module('torchvision')
    with torch.no_grad(), quiet():
        try:
            return torch.onnx.export(model, (example,), dynamic_shapes=(dims,) if dims else None, **options)
        except (torch.onnx.errors.OnnxExporterError, NotImplementedError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip('.')
            how, advice = (
                ('', '') if dynamic == 'none' else (f' with --dynamic {dynamic}', f', or without --dynamic {dynamic}')
            )
            raise ValueError(
                f'the model cannot be exported{how}: {reason}. If the reason is in the attention, export another '
                f'attention or solver{advice}; otherwise export the backbone alone'
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch.onnx prints and logs while it works.

    Yields:
        None
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def check_onnx(
    model: nn.Module, file: str | Path, shape: Sequence[int], dynamic: str, images: Sequence[str] = ()
) -> list[str]:
    """Compare an ONNX file, run by onnxruntime, with the predictions of the toolbox.

    Args:
        model (nn.Module): Model of a toolbox in evaluation mode.
        file (str | Path): The file.
        shape (tuple[int, int]): Height and width of the images in pixels.
        dynamic (str): See :func:`export_onnx`. Variable batches are compared for two numbers of images, variable sizes
            for two more sizes.
        images (Sequence[str]): Image files, each of which is compared. Defaults to (): a photograph that matplotlib
            has.

    Returns:
        list[str]: One line per comparison with the largest difference. A comparison of detectors says if no box was
        found.

    Raises:
        ValueError: If a difference is too large.
    """
    runtime, (height, width) = OnnxModel(file), shape
    cases = [(max(len(images), 1), height, width)]
    if dynamic != 'none':
        cases.append((cases[0][0] + 2, height, width))
    if dynamic == 'all':
        cases += [(1, height + 37, width), (2, max(MIN_SIDE, height // 2), width + 64)]
    lines = []
    for batch, *sides in cases:
        pixels = photographs(images, batch, sides)
        expected = _toolbox_predictions(model, pixels, runtime.task)
        found = runtime.predict(pixels, [data_sample(runtime.task, sides) for _ in pixels])
        difference = _COMPARE[runtime.task](expected, found)
        lines.append(f'{batch}x3x{sides[0]}x{sides[1]}: {difference}')
    return lines


def photographs(files: Sequence[str], count: int, sides: Sequence[int]) -> np.ndarray:
    """Read images of one size. Further uses of the same file are mirrored and shifted, so that all differ.

    Args:
        files (Sequence[str]): Image files. If there is none, a photograph that matplotlib has is used.
        count (int): Number of images.
        sides (tuple[int, int]): Height and width in pixels.

    Returns:
        ndarray: ``(count, 3, H, W)`` uint8, RGB.

    Raises:
        ValueError: If an image cannot be read.
    """
    import cv2
    from matplotlib import cbook

    if not files:
        files = [str(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False))]
    found = []
    for index in range(count):
        image = cv2.resize(read_image(files[index % len(files)]), (sides[1], sides[0]), interpolation=cv2.INTER_AREA)
        turn = index // len(files)
        image = image[:, ::-1] if turn % 2 else image
        found.append(np.roll(image, turn * 7, axis=1).transpose(2, 0, 1))
    return np.stack(found)


@torch.no_grad()
def _toolbox_predictions(model: Any, pixels: np.ndarray, task: str) -> list[Any]:
    inputs = [torch.from_numpy(image[::-1].copy()) for image in pixels]
    samples = [data_sample(task, pixels.shape[2:]) for _ in pixels]
    return model.test_step(dict(inputs=inputs, data_samples=samples))


def _require(ok: bool, text: str) -> str:
    if not ok:
        raise ValueError(
            f'the ONNX file does not match PyTorch: {text}. No file was written: give other --images, or the --shape '
            'of the test pipeline'
        )
    return text


def _compare_classification(expected: Sequence[Any], found: Sequence[Any]) -> str:
    # Relative, because the probabilities of many classes are small.
    errors = [
        (a.pred_score - b.pred_score).abs().max() / a.pred_score.max() for a, b in zip(expected, found, strict=True)
    ]
    # Of tensors, because the maximum of Python ignores NaN.
    error = torch.stack(errors).max().item()
    text = f'probabilities differ by at most {error:.1e} of the largest'
    return _require(error <= MAX_PROBABILITY_ERROR, text)


def _compare_segmentation(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """Where the classes differ, PyTorch's logits of both must be almost equal."""
    differing, errors = 0.0, []
    for a, b in zip(expected, found, strict=True):
        logits, chosen = a.seg_logits.data, b.pred_sem_seg.data
        errors.append(((logits.amax(0) - logits.gather(0, chosen)[0]) / logits.abs().max()).max())
        differing += (chosen != a.pred_sem_seg.data).float().mean().item() / len(expected)
    worst = torch.stack(errors).max().item()
    text = f'{differing:.4%} of the pixels differ, by {worst:.1e} of the largest logit'
    return _require(worst <= MAX_LOGIT_ERROR, text)


def _compare_detection(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """Each box of one side must have a box of the other side with the same class, place and score."""
    boxes = matched = 0
    worst, masks = 0.0, 1.0
    for a, b in zip(expected, found, strict=True):
        for one, other in ((a.pred_instances, b.pred_instances), (b.pred_instances, a.pred_instances)):
            boxes += len(one)
            if len(one) == 0 or len(other) == 0:
                continue
            place = (one.bboxes[:, None] - other.bboxes).abs().amax(-1)
            score = (one.scores[:, None] - other.scores).abs()
            fits = (one.labels[:, None] == other.labels) & (place <= MAX_BOX_ERROR) & (score <= MAX_SCORE_ERROR)
            matched += int(fits.any(1).sum())
            best = torch.where(fits, score, torch.inf).argmin(1)
            for row in fits.any(1).nonzero().flatten().tolist():
                worst = max(worst, place[row, best[row]].item())
                if 'masks' in one:
                    both = torch.stack([one.masks[row], other.masks[best[row]]])
                    union = both.any(0).sum().item()
                    masks = min(masks, both.all(0).sum().item() / union if union else 1.0)
    if boxes == 0:
        return 'no box was found, so none was compared: give --images with objects'
    text = f'{matched} of {boxes} boxes match, to {worst:.1e} pixels'
    if 'masks' in expected[0].pred_instances:
        text += f', smallest IoU of masks {masks:.4f}'
    return _require(matched >= MIN_MATCHED * boxes and masks >= MIN_MASK_IOU, text)


_COMPARE = dict(
    classification=_compare_classification,
    segmentation=_compare_segmentation,
    detection=_compare_detection,
    instances=_compare_detection,
)
