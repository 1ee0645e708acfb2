"""Loading of trained models, and predictions drawn by the inferencer of the toolbox."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from soft_mm.checkpoints.matching import check_normalized, check_whole_model, find_state_dict
from soft_mm.checkpoints.reading import load_weights, local_file
from soft_mm.models.attention.softmax_free import normalized_options
from soft_mm.models.soft import PatchEmbed
from soft_mm.utils import build_model, read_config, without_pretrained

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def find_images(path: str | Path) -> list[str]:
    """List the image files of a folder, sorted by name, or a single image file.

    Args:
        path (str | Path): Image file or folder.

    Returns:
        list[str]: Image files.

    Raises:
        FileNotFoundError: If the file or folder does not exist.
        ValueError: If a file cannot be read as an image, or the folder contains no images.
    """
    from PIL import Image

    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f'{path} contains no images: expected files that end in {", ".join(SUFFIXES)}')
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f'{path} does not exist: expected an image file or a folder')
    for file in files:
        try:
            with Image.open(file) as image:
                image.verify()
        except Exception as error:
            # The type of the exception for a truncated file depends on its format.
            raise ValueError(f'{file} cannot be read as an image: {error}; replace or remove it') from None
    return [str(file) for file in files]


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file.

    Args:
        path (str | Path): Image file.

    Returns:
        ndarray: ``(H, W, 3)`` uint8, RGB.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If OpenCV cannot read it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist: expected an image file')
    # On Windows, cv2.imread cannot open paths with characters outside the system's code page.
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{path} cannot be read by OpenCV as an image: convert it to PNG or JPEG')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def check_weights(model: nn.Module, checkpoint: dict[str, Any], path: str) -> dict[str, Tensor]:
    """Check that a checkpoint has every weight of a model. The toolboxes do not check this.

    Args:
        model (nn.Module): Model, which may have wrappers for distributed training or test-time augmentation.
        checkpoint (dict): Content of the checkpoint, see :func:`~soft_mm.checkpoints.load_weights`.
        path (str): File of the checkpoint, for the message.

    Returns:
        dict[str, Tensor]: Weights with the keys of the model.

    Raises:
        ValueError: If weights are missing or have another shape, or if attention is normalised in only one of model and
            checkpoint. Position embeddings are resized, so their grid may differ.
    """
    check_normalized(checkpoint, normalized_options(model), path)
    found = {key.removeprefix('module.'): value for key, value in find_state_dict(checkpoint, path).items()}
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule('module')
    check_whole_model(found, model.state_dict(), path)
    return found


def read_whole_model(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Read the checkpoint of a whole model safely, before a toolbox reads the file again and unpickles it unchecked.

    Args:
        source (str | Path): File, or http or https address.

    Returns:
        tuple[str, dict]: Local file, for the toolbox, and its content.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is refused or damaged, see :func:`~soft_mm.checkpoints.load_weights`, or if it is a
            safetensors file, which the toolboxes cannot read.
    """
    if str(source).endswith('.safetensors'):
        raise ValueError(f'{source}: the toolboxes cannot read safetensors files: give a .pth file')
    content = load_weights(source)
    return local_file(source), content


def load_model(config: str | Path, checkpoint: str | Path) -> nn.Module:
    """Build the model of a config and load its checkpoint.

    Args:
        config (str | Path): Config file of mmpretrain, mmdet or mmsegmentation.
        checkpoint (str | Path): File of its checkpoint, or http or https address.

    Returns:
        nn.Module: Model in evaluation mode.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If the config has no backbone, or the checkpoint does not fit or cannot be read.
    """
    return load_with_content(config, checkpoint)[1]


def load_with_content(config: str | Path, checkpoint: str | Path) -> tuple[Config, nn.Module, dict[str, Any]]:
    """Load a model as :func:`load_model` does, and return the files that were read too.

    Args:
        config (str | Path): See :func:`load_model`.
        checkpoint (str | Path): See :func:`load_model`.

    Returns:
        tuple[Config, nn.Module, dict]: Config, without pretrained weights; model in evaluation mode; content of the
        checkpoint.

    Raises:
        FileNotFoundError: See :func:`load_model`.
        ValueError: See :func:`load_model`.
    """
    cfg = read_config(config)
    if without_pretrained(cfg.get('model', {})) == 0:
        raise ValueError(f'{config} has no `model` with a backbone; give the config of a whole model')
    model = build_model(cfg)
    file, content = read_whole_model(checkpoint)
    model.load_state_dict(check_weights(model, content, file), strict=False)
    return cfg, model.eval(), content


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fuse each BatchNorm of SOFT's patch embeddings into the convolution before it, in place.

    The outputs in evaluation mode stay the same up to rounding. A fused model must not be trained.

    Args:
        model (nn.Module): Model in evaluation mode with one or more SOFT backbones.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError('the model is in training mode: call eval() before fuse_conv_bn()')
    for embed in model.modules():
        if not isinstance(embed, PatchEmbed):
            continue
        layers: list[Any] = list(embed)
        for index in range(0, len(embed), 3):
            # A BatchNorm may already be fused (nn.Identity).
            if isinstance(layers[index + 1], nn.modules.batchnorm._BatchNorm):
                embed[index] = fuse_conv_bn_eval(layers[index], layers[index + 1])
                embed[index + 1] = nn.Identity()
    return model


def check_score_threshold(score_thr: float | None, scope: str, source: str | Path) -> None:
    """Check the smallest score of a box to draw.

    Args:
        score_thr (float | None): Score, or None.
        scope (str): Toolbox of the model.
        source (str | Path): Config or ONNX file of the model, for the message.

    Raises:
        ValueError: If the score is outside [0, 1], or given for a model that is no detector.
    """
    if score_thr is None:
        return
    if not 0 <= score_thr <= 1:
        raise ValueError(f'score_thr={score_thr}: expected a number from 0 to 1')
    if scope != 'mmdet':
        raise ValueError(f'score_thr={score_thr} has no effect, because {source} is not a detector: leave it out')


def predict(
    images: list[str],
    config: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    device: str | None = None,
    score_thr: float | None = None,
) -> Path:
    """Draw predictions for images: class scores, boxes and masks, or a segmentation.

    Args:
        images (list[str]): Image files.
        config (str | Path): Config file of mmpretrain, mmdet or mmsegmentation.
        checkpoint (str | Path): File of its checkpoint, or http or https address.
        out_dir (str | Path): Output folder. One picture per image is written to its subfolder ``vis``.
        device (str | None): ``'cpu'``, ``'cuda'`` or ``'cuda:i'``. Defaults to None: a GPU if there is one.
        score_thr (float | None): Smallest score of a box that is drawn, for detectors only. Defaults to None: 0.3.

    Returns:
        Path: Folder of the pictures.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If the config belongs to no toolbox, ``score_thr`` is outside [0, 1] or given for a model that is no
            detector, the checkpoint does not fit or cannot be read, or two pictures would have the same name.
    """
    cfg, pictures = read_config(config), Path(out_dir, 'vis')
    scope = cfg.get('default_scope')
    if scope not in ('mmpretrain', 'mmdet', 'mmseg'):
        raise ValueError(f"{config}: default_scope={scope!r}: expected 'mmpretrain', 'mmdet' or 'mmseg'")
    check_score_threshold(score_thr, scope, config)
    file, weights = read_whole_model(checkpoint)
    # Another toolbox may have been the default scope of this process.
    init_default_scope(scope)
    without_pretrained(cfg.model)
    if scope == 'mmpretrain':
        from mmpretrain.apis import ImageClassificationInferencer

        # mmpretrain drops up to two suffixes of a name.
        names = [Path(Path(image).stem).with_suffix('').name for image in images]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'several images have the same name apart from the suffix, {repeated[:3]}: rename them')
        inferencer = ImageClassificationInferencer(cfg, pretrained=file, device=device)
        options: dict[str, Any] = dict(show_dir=str(pictures))
    elif scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(cfg, weights=file, device=device)
        options = dict(out_dir=str(out_dir), pred_score_thr=0.3 if score_thr is None else score_thr)
    else:
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(cfg, weights=file, device=device)
        options = dict(out_dir=str(out_dir))
    check_weights(inferencer.model, weights, file)
    fuse_conv_bn(inferencer.model)
    pictures.mkdir(parents=True, exist_ok=True)
    inferencer(images, **options)
    return pictures
