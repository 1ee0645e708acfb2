"""Running of exported ONNX files by onnxruntime: predictions as data samples of the toolboxes, and pictures of them."""

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

from soft_mm.inference import read_image

TOOLBOXES = dict(classification='mmpretrain', segmentation='mmseg', detection='mmdet', instances='mmdet')


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
        raise ValueError(f"{', '.join(missing)} must be installed for ONNX: pip install 'soft_mm[export]'")
    return found


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
            ValueError: If the file does not take images of this shape.
        """
        given = (images.shape[0], *images.shape[2:])
        if any(side not in (None, size) for side, size in zip(self.shape, given)):
            expected = 'x'.join('any' if side is None else str(side) for side in self.shape)
            raise ValueError(
                f'{self.file} takes images x height x width = {expected}, not {"x".join(map(str, given))}: '
                'resize the images, or export with --shape, or with --dynamic'
            )
        return self.session.run(None, {'image': images.astype(self.dtype)})

    def predict(self, images: np.ndarray, samples: Sequence[Any]) -> list[Any]:
        """Run the file and add its predictions to data samples.

        Args:
            images (np.ndarray): RGB, 0 to 255, ``(N, 3, H, W)``.
            samples (Sequence[DataSample]): One data sample of the toolbox per image. For boxes and class maps their
                metadata have ``ori_shape``, for boxes also ``scale_factor``.

        Returns:
            list[DataSample]: The data samples, with predictions for the original image.
        """
        batch, count = self.shape[0] or len(images), len(images)
        for start in range(0, count, batch):
            part = images[start : start + batch]
            # A file with a fixed batch computes the last image again to fill it.
            filled = np.concatenate([part, part[-1:].repeat(batch - len(part), 0)])
            for sample, *outputs in zip(samples[start : start + batch], *self(filled)):
                self._add(sample, outputs)
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
        result = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        if masks:
            sample.pred_instances = paste_masks(result, masks[0], sample)
        else:
            result.bboxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
            sample.pred_instances = result


def paste_masks(result: InstanceData, masks: torch.Tensor, sample: Any) -> InstanceData:
    """Draw masks at the places of their boxes, with mmdet's function, and scale both to the original image.

    Args:
        result (InstanceData): Boxes and labels of ``K`` objects.
        masks (Tensor): Probabilities ``(K, h, w)`` on a grid over each box.
        sample (DetDataSample): Data sample with ``ori_shape`` and ``scale_factor``.

    Returns:
        InstanceData: With ``masks``, ``(K, H, W)``, bool.
    """
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    head = FCNMaskHead(num_convs=0, class_agnostic=True)
    metas, settings = [sample.metainfo], ConfigDict(mask_thr_binary=0.5)
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

    Images are resized to a fixed input size: for classes so that they cover it, and cropped at the centre; for boxes so
    that they fit into it, and padded with the mean colour; for class maps without regard to the aspect ratio.

    Args:
        images (list[str]): Image files.
        file (str | Path): File of ``tools/export_onnx.py``.
        out_dir (str | Path): Output folder. One picture per image is written to its subfolder ``vis``.
        score_thr (float | None): Smallest score of a box that is drawn. Defaults to None: 0.3.

    Returns:
        Path: Folder of the pictures.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file or an image cannot be read.
    """
    model, pictures = OnnxModel(file), Path(out_dir, 'vis')
    scope = TOOLBOXES[model.task]
    importlib.import_module(f'{scope}.visualization')
    structures = importlib.import_module(f'{scope}.structures')
    pictures.mkdir(parents=True, exist_ok=True)
    with DefaultScope.overwrite_default_scope(scope):
        visualizer = _visualizer(model)
        for name in images:
            image = read_image(name)
            resized, factor = _fit(image, model)
            kind = dict(mmpretrain='DataSample', mmseg='SegDataSample', mmdet='DetDataSample')[scope]
            metas = dict(ori_shape=image.shape[:2], img_shape=resized.shape[:2], scale_factor=(factor, factor))
            sample = getattr(structures, kind)(metainfo=metas)
            model.predict(resized.transpose(2, 0, 1)[None], [sample])
            options: dict[str, Any] = dict(out_file=str(pictures / Path(name).with_suffix('.png').name))
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
        palette = model.palette or np.random.RandomState(42).randint(0, 256, (len(model.classes), 3)).tolist()
        visualizer.dataset_meta = dict(classes=model.classes, palette=palette)
        return visualizer
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=model.classes, palette=model.palette or 'random')
    return visualizer


def _fit(image: np.ndarray, model: OnnxModel) -> tuple[np.ndarray, float]:
    """Resize an image ``(H, W, 3)`` for the input of a file. Return it with its scale factor."""
    _, height, width = model.shape
    if height is None or width is None:
        return image, 1.0
    ratios = height / image.shape[0], width / image.shape[1]
    if model.task == 'segmentation':
        return cv2.resize(image, (width, height)), 1.0
    factor = max(ratios) if model.task == 'classification' else min(ratios)
    sides = [max(round(side * factor), 1) for side in image.shape[:2]]
    image = cv2.resize(image, sides[::-1])
    if model.task == 'classification':
        top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
        return image[top : top + height, left : left + width], factor
    canvas = np.empty((height, width, 3), image.dtype)
    canvas[:] = np.round(model.mean)
    canvas[: sides[0], : sides[1]] = image[:height, :width]
    return canvas, factor
