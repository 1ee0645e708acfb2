"""Export of trained models to ONNX, with a check against the toolbox's own predictions."""

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from soft_mm.image_models import OUTPUTS, ImageModel, image_model
from soft_mm.inference import load_model, read_image
from soft_mm.models.arch import MIN_SIDE
from soft_mm.onnx_model import TOOLBOXES, OnnxModel, import_extra
from soft_mm.ops.checks import check_choice
from soft_mm.utils import atomic_path, read_config
from soft_mm.version import __version__

DYNAMIC = ('none', 'batch', 'all')
INPUT_DTYPES = ('float32', 'uint8')
# Largest differences to PyTorch that the check accepts.
MAX_PROBABILITY_ERROR = 1e-3
MAX_LOGIT_ERROR = 1e-3
MAX_SCORE_ERROR = 1e-3
MAX_BOX_ERROR = 1e-3
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

    The input ``image`` is RGB, 0 to 255, ``(N, 3, H, W)``. The outputs are those of the classes of
    :mod:`soft_mm.image_models`. The metadata of the file hold the task, the classes and their palette, and the mean and
    deviation of the normalisation, which is in the graph.

    Args:
        config (str | Path): Config file of mmpretrain, mmdet or mmsegmentation.
        checkpoint (str | Path): File of its checkpoint, or http or https address.
        out (str | Path): File to write, ``.onnx``.
        shape (tuple[int, int]): Height and width of the images in pixels, at least 32.
        dynamic (str): ``'none'``: one image of this size. ``'batch'``: any number of images. ``'all'``: any number and
            any size from 32 pixels. Defaults to ``'none'``.
        input_dtype (str): ``'float32'`` or ``'uint8'``. Defaults to ``'float32'``.
        images (Sequence[str]): Image files for the check. Defaults to (): a photograph that matplotlib has.
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
    if not hasattr(torch.compiler, 'is_exporting'):
        raise ValueError(f'PyTorch {torch.__version__} is too old to export: install 2.7 or newer')
    model = load_model(config, checkpoint)
    wrapped = image_model(model).eval()
    with atomic_path(out) as temporary:
        program = _to_onnx(wrapped, (height, width), dynamic, input_dtype)
        program.model.metadata_props['soft_mm'] = json.dumps(describe(wrapped, read_config(config)))
        program.save(temporary, external_data=False)
        return check_onnx(model, temporary, shape, dynamic, images) if check else []


def describe(model: ImageModel, cfg: Config) -> dict[str, Any]:
    """Collect what a user of an exported file must know.

    Args:
        model (ImageModel): The exported function.
        cfg (Config): Config of the model.

    Returns:
        dict: The metadata of the file.
    """
    meta = class_names(cfg)
    classes = meta.get('classes') or [str(index) for index in range(number_of_classes(model))]
    if len(classes) != number_of_classes(model):
        raise ValueError(
            f'the data set of the config has {len(classes)} classes and the head {number_of_classes(model)}: correct '
            'num_classes or metainfo'
        )
    return dict(
        task=model.task,
        outputs=OUTPUTS[model.task],
        classes=list(classes),
        palette=[list(colour) for colour in meta['palette']] if meta.get('palette') else None,
        input='RGB, 0 to 255, (N, 3, H, W)',
        mean=(model.mean.flip(1) if model.flip else model.mean).flatten().tolist(),
        std=(model.std.flip(1) if model.flip else model.std).flatten().tolist(),
        soft_mm_version=__version__,
    )


def class_names(cfg: Config) -> dict[str, Any]:
    """Read the names and colours of the classes from the test data set of a config, without opening its files.

    Args:
        cfg (Config): Config of a toolbox.

    Returns:
        dict: With ``classes``, ``palette`` or neither.
    """
    data: Any = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in data:
        data = data.dataset
    scope = cfg.get('default_scope')
    registry = importlib.import_module(f'{scope}.registry').DATASETS
    importlib.import_module(f'{scope}.datasets')
    known = getattr(registry.get(data.get('type', '')), 'METAINFO', {})
    given = {key: data[key] for key in ('classes',) if key in data}
    return {**known, **data.get('metainfo', {}), **given}


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
    with torch.no_grad(), quiet():
        try:
            return torch.onnx.export(model, (example,), dynamic_shapes=(dims,) if dims else None, **options)
        except (torch.onnx.errors.OnnxExporterError, NotImplementedError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            advice = '' if dynamic == 'none' else f', or without --dynamic {dynamic}'
            raise ValueError(
                f'the model cannot be exported{advice and f" with --dynamic {dynamic}"}: {reason}. Export another '
                f'attention or solver{advice}'
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress and the notes of torch.onnx, which name its own code.

    Yields:
        None
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(logging.NOTSET)


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
        images (Sequence[str]): Image files. Defaults to (): a photograph that matplotlib has.

    Returns:
        list[str]: One line per comparison with the largest difference.

    Raises:
        ValueError: If a difference is too large.
    """
    runtime, (height, width) = OnnxModel(file), shape
    cases = [(1, height, width)]
    if dynamic != 'none':
        cases.append((3, height, width))
    if dynamic == 'all':
        cases += [(1, height + 37, width), (2, max(MIN_SIDE, height // 2), width + 64)]
    lines = []
    for batch, *sides in cases:
        pixels = photographs(images, batch, sides)
        expected = _toolbox_predictions(model, pixels, runtime.task)
        found = runtime.predict(pixels, [_sample(runtime.task, sides) for _ in pixels])
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


def _sample(task: str, sides: Sequence[int]) -> Any:
    structures = importlib.import_module(f'{TOOLBOXES[task]}.structures')
    kind = dict(mmpretrain='DataSample', mmseg='SegDataSample', mmdet='DetDataSample')[TOOLBOXES[task]]
    size = tuple(sides)
    return getattr(structures, kind)(metainfo=dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0)))


@torch.no_grad()
def _toolbox_predictions(model: Any, pixels: np.ndarray, task: str) -> list[Any]:
    inputs = [torch.from_numpy(image[::-1].copy()) for image in pixels]
    samples = [_sample(task, pixels.shape[2:]) for _ in pixels]
    return model.test_step(dict(inputs=inputs, data_samples=samples))


def _require(ok: bool, text: str) -> str:
    if not ok:
        raise ValueError(f'the ONNX file does not match PyTorch: {text}. No file was written')
    return text


def _compare_classification(expected: Sequence[Any], found: Sequence[Any]) -> str:
    # Relative, because the probabilities of many classes are small.
    error = max(
        ((a.pred_score - b.pred_score).abs().max() / a.pred_score.max()).item()
        for a, b in zip(expected, found, strict=True)
    )
    text = f'probabilities differ by at most {error:.1e} of the largest'
    return _require(error <= MAX_PROBABILITY_ERROR, text)


def _compare_segmentation(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """Where the classes differ, PyTorch's logits of both must be almost equal."""
    differing, worst = 0.0, 0.0
    for a, b in zip(expected, found, strict=True):
        logits, chosen = a.seg_logits.data, b.pred_sem_seg.data
        shortfall = (logits.amax(0) - logits.gather(0, chosen)[0]) / logits.abs().max()
        worst = max(worst, shortfall.max().item())
        differing += (chosen != a.pred_sem_seg.data).float().mean().item() / len(expected)
    text = f'{differing:.4%} of the pixels differ, by {worst:.1e} of the largest logit'
    return _require(worst <= MAX_LOGIT_ERROR, text)


def _compare_detection(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """Each box of one side must have a box of the other side with the same class, place and score."""
    boxes = matched = 0
    worst, masks = 0.0, 1.0
    for a, b in zip(expected, found, strict=True):
        side = max(a.ori_shape)
        for one, other in ((a.pred_instances, b.pred_instances), (b.pred_instances, a.pred_instances)):
            boxes += len(one)
            if len(one) == 0 or len(other) == 0:
                continue
            place = (one.bboxes[:, None] - other.bboxes).abs().amax(-1) / side
            score = (one.scores[:, None] - other.scores).abs()
            fits = (one.labels[:, None] == other.labels) & (place <= MAX_BOX_ERROR) & (score <= MAX_SCORE_ERROR)
            matched += int(fits.any(1).sum())
            best = torch.where(fits, score, torch.inf).argmin(1)
            for row in fits.any(1).nonzero().flatten().tolist():
                worst = max(worst, place[row, best[row]].item() * side)
                if 'masks' in one:
                    both = torch.stack([one.masks[row], other.masks[best[row]]])
                    masks = min(masks, both.all(0).sum().item() / max(both.any(0).sum().item(), 1))
    text = f'{matched} of {boxes} boxes match, to {worst:.1e} pixels'
    if boxes and 'masks' in expected[0].pred_instances:
        text += f', smallest IoU of masks {masks:.4f}'
    return _require(matched >= MIN_MATCHED * boxes and masks >= MIN_MASK_IOU, text)


_COMPARE = dict(
    classification=_compare_classification,
    segmentation=_compare_segmentation,
    detection=_compare_detection,
    instances=_compare_detection,
)
