"""Running of exported ONNX files by onnxruntime: predictions as data samples of the toolboxes, and pictures of them."""

import ast
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData

from soft_mm.inference import check_score_threshold, read_image
from soft_mm.models.arch import MIN_SIDE
from soft_mm.utils import DataError

TOOLBOXES = dict(classification='mmpretrain', segmentation='mmseg', detection='mmdet', instances='mmdet')
_SAMPLES = dict(mmpretrain='DataSample', mmseg='SegDataSample', mmdet='DetDataSample')


def data_sample(
    task: str, shape: Sequence[int], img_shape: Sequence[int] = (), scale: Sequence[float] = (1.0, 1.0)
) -> Any:
    """Make an empty data sample of the toolbox of a task.

    Args:
        task (str): Key of :data:`TOOLBOXES`.
        shape (tuple[int, int]): Height and width of the original image in pixels.
        img_shape (tuple[int, int]): Height and width of the input. Defaults to (): as ``shape``.
        scale (tuple[float, float]): Ratio of the widths, and of the heights, of the input and the original image.

    Returns:
        DataSample: The data sample.
    """
    toolbox = TOOLBOXES[task]
    structures = importlib.import_module(f'{toolbox}.structures')
    metas = dict(ori_shape=tuple(shape), img_shape=tuple(img_shape or shape), scale_factor=tuple(scale))
    return getattr(structures, _SAMPLES[toolbox])(metainfo=metas)


def import_extra(*names: str) -> list[ModuleType]:
    """Import packages of the extra ``soft_mm[export]``.

    Args:
        *names (str): Packages, such as ``'onnxruntime'``.

    Returns:
        list[module]: The packages.

    Raises:
        ValueError: If packages are not installed.
    """
    found, missing = [], []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError:
            missing.append(name)
    if missing:
        raise ValueError(
            f'{", ".join(missing)} must be installed for ONNX: pip install onnx onnxscript onnxruntime, or the extra '
            'soft_mm[export]'
        )
    return found


def attention_nodes(file: str | Path) -> list[str]:
    """List the nodes of an ONNX file that compute softmax-free attention, except its last projection.

    Keep them out of int8, because the inverse of the landmarks' kernel amplifies the errors of the queries.

    Args:
        file (str | Path): File of PyTorch's exporter (``dynamo=True``), which notes the module of each node.

    Returns:
        list[str]: Names of the nodes, for ``nodes_to_exclude`` of onnxruntime and ``IgnoredScope`` of NNCF.

    Raises:
        ValueError: If onnx is not installed, or the file does not name the modules of its nodes.
    """
    (onnx,) = import_extra('onnx')
    names, noted = [], False
    for node in onnx.load(file).graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes, classes = (
            ast.literal_eval(notes.get(f'pkg.torch.onnx.{key}', '[]')) for key in ('name_scopes', 'class_hierarchy')
        )
        noted = noted or bool(classes)
        inside = any(name.endswith('.SoftmaxFreeAttention') for name in classes)
        if inside and not any(scope.endswith('.proj') for scope in scopes):
            names.append(node.name)
    if not noted:
        raise ValueError(f'{file} does not name the modules of its nodes: export it with tools/export_onnx.py')
    return names


class OnnxModel:
    """An ONNX file of ``tools/export_onnx.py``, run by onnxruntime on the CPU.

    Args:
        file (str | Path): The file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If onnxruntime is not installed, or the file was not written by ``tools/export_onnx.py``.

    Attributes:
        task: ``'classification'``, ``'segmentation'``, ``'detection'`` or ``'instances'``.
        classes: Names of the classes.
        palette: One RGB colour per class, or None.
        mean: RGB mean of the normalisation, the colour of padding.
        made_for: Height and width in pixels for which the file was made.
        mask_threshold: Probability from which a pixel belongs to a mask.
        shape: ``(N, H, W)`` of the input. An entry is None if it is variable.
    """

    def __init__(self, file: str | Path) -> None:
        (onnxruntime,) = import_extra('onnxruntime')
        if not Path(file).is_file():
            raise FileNotFoundError(f'{file} does not exist')
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        except Exception as error:
            # onnxruntime has no public base class of its errors.
            raise ValueError(f'{file} is not an ONNX file that onnxruntime can read: {error}') from None
        properties = self.session.get_modelmeta().custom_metadata_map
        if 'soft_mm' not in properties:
            raise ValueError(f'{file} has no metadata of soft_mm: give a file of tools/export_onnx.py')
        metadata = json.loads(properties['soft_mm'])
        self.file = Path(file)
        self.task: str = metadata['task']
        self.classes: list[str] = metadata['classes']
        self.palette: list[list[int]] | None = metadata['palette']
        self.mean: list[float] = metadata['mean']
        self.made_for: tuple[int, int] = tuple(metadata['shape'])
        self.mask_threshold: float = metadata['mask_threshold']
        (given,) = self.session.get_inputs()
        self.dtype = np.uint8 if 'uint8' in given.type else np.float32
        batch, _, *sides = (side if isinstance(side, int) else None for side in given.shape)
        self.shape = (batch, *sides)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Run the file.

        Args:
            images (np.ndarray): RGB, 0 to 255, ``(N, 3, H, W)``.

        Returns:
            list[np.ndarray]: The outputs in the order of the file.

        Raises:
            DataError: If the file does not take images of this shape or dtype.
        """
        given = (images.shape[0], *images.shape[2:])
        if any(side not in (None, size) for side, size in zip(self.shape, given)):
            expected = 'x'.join('any' if side is None else str(side) for side in self.shape)
            raise DataError(
                f'{self.file} takes images x height x width = {expected}, not {"x".join(map(str, given))}: '
                'resize the images, or export with --shape, or with --dynamic'
            )
        if min(images.shape[2:]) < MIN_SIDE:
            raise DataError(
                f'{self.file} takes images with both sides >= {MIN_SIDE}, not {images.shape[2:]}: enlarge them'
            )
        if self.dtype == np.uint8 and images.dtype != np.uint8:
            raise DataError(f'{self.file} takes images of uint8, not {images.dtype}: convert them')
        return self.session.run(None, {'image': images.astype(self.dtype)})

    def predict(self, images: np.ndarray, samples: Sequence[Any]) -> list[Any]:
        """Run the file and add its predictions to data samples.

        Args:
            images (np.ndarray): RGB, 0 to 255, ``(N, 3, H, W)``.
            samples (Sequence[DataSample]): One data sample of the toolbox per image. For boxes and class maps their
                metadata have ``ori_shape``, for boxes also ``scale_factor``.

        Returns:
            list[DataSample]: The data samples, with predictions for the original image. A class map is resized by
            nearest neighbours, whereas mmsegmentation resizes its logits.

        Raises:
            ValueError: See :meth:`__call__`.
        """
        # A file takes one image, or any number.
        parts = np.split(images, len(images)) if self.shape[0] else [images]
        outputs = [np.concatenate(output) for output in zip(*map(self, parts))]
        for sample, *own in zip(samples, *outputs, strict=True):
            self._add(sample, own)
        return list(samples)

    def _add(self, sample: Any, outputs: list[np.ndarray]) -> None:
        if self.task == 'classification':
            score = torch.from_numpy(outputs[0])
            sample.set_pred_score(score).set_pred_label(score.argmax(0, keepdim=True))
            return
        height, width = sample.ori_shape[:2]
        if self.task == 'segmentation':
            class_map = cv2.resize(outputs[0].astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(class_map)[None].long())
            return
        boxes, scores, labels, *masks = (torch.from_numpy(output[outputs[1] > 0]) for output in outputs)
        # The input may have padding on the right and at the bottom.
        rows, columns = sample.img_shape[:2]
        boxes = torch.minimum(boxes, boxes.new_tensor([columns, rows, columns, rows]))
        result = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        if masks:
            sample.pred_instances = paste_masks(result, masks[0], sample, self.mask_threshold)
        else:
            result.bboxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
            sample.pred_instances = result


def paste_masks(result: InstanceData, masks: torch.Tensor, sample: Any, threshold: float = 0.5) -> InstanceData:
    """Draw masks at the places of their boxes, with mmdet's function, and scale both to the original image.

    Args:
        result (InstanceData): Boxes and labels of ``K`` objects.
        masks (Tensor): Probabilities ``(K, h, w)`` on a grid over each box.
        sample (DetDataSample): Data sample with ``ori_shape`` and ``scale_factor``.
        threshold (float): Probability from which a pixel belongs to a mask. Defaults to 0.5.

    Returns:
        InstanceData: With ``masks``, ``(K, H, W)``, bool.
    """
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    metas, settings = [sample.metainfo], ConfigDict(mask_thr_binary=threshold)
    # The head has no part in this but its method, so its weights need no initialisation.
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmdet'):
        head = FCNMaskHead(num_convs=0, class_agnostic=True)
    return head.predict_by_feat((masks[:, None],), [result], metas, settings, rescale=True, activate_map=True)[0]


@MMENGINE_MODELS.register_module()
class OnnxTestModel(BaseModel):
    """Model that mmengine's runner can test, and that computes with an ONNX file.

    Args:
        file (str): File of ``tools/export_onnx.py``.
        data_preprocessor (dict | None): Of the config, which mmengine's runner passes. It is not used, because the file
            contains the normalisation. Defaults to None.
    """

    def __init__(self, file: str, data_preprocessor: object = None) -> None:
        super().__init__()
        self.onnx = OnnxModel(file)

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """Compute the predictions of a batch.

        Args:
            data (dict): ``inputs``, BGR images ``(3, H, W)``, and ``data_samples``.

        Returns:
            list[DataSample]: The data samples with predictions.
        """
        found: list[Any] = []
        for image, sample in zip(data['inputs'], data['data_samples']):
            found += self.onnx.predict(image.flip(0)[None].numpy(), [sample])
        return found

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error, because an ONNX file cannot be trained."""
        raise NotImplementedError('an ONNX file can only be tested: train the model of the config')


def predict_onnx(images: list[str], file: str | Path, out_dir: str | Path, score_thr: float | None = None) -> Path:
    """Draw the predictions of an ONNX file with the visualiser of the toolbox.

    Images are resized to the size for which the file was made: for classes so that they cover it, and cropped at the
    centre; for boxes and class maps so that they fit into it. If the file has a fixed size, images for boxes are then
    padded with the mean colour, and those for class maps stretched.

    Args:
        images (list[str]): Image files.
        file (str | Path): File of ``tools/export_onnx.py``.
        out_dir (str | Path): Output folder. One picture per image is written to its subfolder ``vis``.
        score_thr (float | None): Smallest score of a box that is drawn, for detectors only. Defaults to None: 0.3.

    Returns:
        Path: Folder of the pictures.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file or an image cannot be read, two pictures would have the same name, or ``score_thr`` is
            outside [0, 1] or given for a model that is no detector.
    """
    model, pictures = OnnxModel(file), Path(out_dir, 'vis')
    scope = TOOLBOXES[model.task]
    check_score_threshold(score_thr, scope, file)
    names = [Path(image).with_suffix('.png').name for image in images]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'several images would be drawn as {repeated[:3]}: rename them')
    importlib.import_module(f'{scope}.visualization')
    pictures.mkdir(parents=True, exist_ok=True)
    with DefaultScope.overwrite_default_scope(scope):
        visualizer = _visualizer(model)
        for source, name in zip(images, names):
            image = read_image(source)
            resized, img_shape, scale = _fit(image, model)
            sample = data_sample(model.task, image.shape[:2], img_shape, scale)
            model.predict(resized.transpose(2, 0, 1)[None], [sample])
            options: dict[str, Any] = dict(out_file=str(pictures / name))
            if scope == 'mmpretrain':
                visualizer.visualize_cls(image, sample, classes=model.classes, **options)
            else:
                if scope == 'mmdet':
                    options['pred_score_thr'] = 0.3 if score_thr is None else score_thr
                visualizer.add_datasample('', image, sample, draw_gt=False, **options)
    return pictures


def _visualizer(model: OnnxModel) -> Any:
    if model.task == 'classification':
        from mmpretrain.visualization import UniversalVisualizer

        return UniversalVisualizer()
    if model.task == 'segmentation':
        from mmseg.visualization import SegLocalVisualizer

        visualizer = SegLocalVisualizer()
        # A data set without a palette has random colours in mmsegmentation too.
        palette = model.palette or np.random.RandomState(42).randint(0, 255, (len(model.classes), 3)).tolist()
        visualizer.dataset_meta = dict(classes=model.classes, palette=palette)
        return visualizer
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=model.classes, palette=model.palette or 'random')
    return visualizer


def _fit(image: np.ndarray, model: OnnxModel) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
    """Resize an image ``(H, W, 3)`` for a file. Return the input, its size without padding, and its scales (x, y)."""
    height, width = model.made_for
    fixed = None not in model.shape[1:]
    ratios = height / image.shape[0], width / image.shape[1]
    if model.task == 'segmentation' and fixed:
        return cv2.resize(image, (width, height)), (height, width), ratios[::-1]
    factor = max(ratios) if model.task == 'classification' else min(ratios)
    least = 1 if fixed else MIN_SIDE
    rows, columns = (max(round(side * factor), least) for side in image.shape[:2])
    scales = columns / image.shape[1], rows / image.shape[0]
    image = cv2.resize(image, (columns, rows))
    if model.task == 'classification':
        top, left = (rows - height) // 2, (columns - width) // 2
        return image[top : top + height, left : left + width], (height, width), scales
    if not fixed:
        return image, (rows, columns), scales
    canvas = np.empty((height, width, 3), image.dtype)
    canvas[:] = np.round(model.mean)
    canvas[:rows, :columns] = image[:height, :width]
    return canvas, (rows, columns), scales
