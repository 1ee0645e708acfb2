"""Pictures of what a trained model says of images, drawn by the toolbox that the model is of."""

import contextlib
import importlib
from pathlib import Path

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import DefaultScope, init_default_scope

from soft_mm.checkpoints import load_weights

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


@contextlib.contextmanager
def toolbox_scope(cfg):
    """Within it models are built by the registries of the toolbox that a config is for; yields their scope.

    Args:
        cfg (Config): the config.
    """
    scope = cfg.get('default_scope', 'mmengine')
    if scope != 'mmengine':
        importlib.import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        yield scope


def find_images(path):
    """The image file, or the image files of the folder in the order of their names.

    Args:
        path (str | Path): image file or folder.

    Returns:
        list[str]: image files.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if a file is no image that can be read, or the folder holds none.
    """
    from PIL import Image

    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f'{path} holds no images ({", ".join(SUFFIXES)})')
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f'there is no image or folder {path}')
    for file in files:
        try:
            with Image.open(file) as image:
                image.verify()
        except Exception as error:
            # Each format has its own exceptions for a file that is cut off.
            raise ValueError(f'{file} cannot be read as an image: {error}') from None
    return [str(file) for file in files]


def check_weights(model, checkpoint, path):
    """Refuse a checkpoint that would leave parts of a model as they were initialised, which the toolboxes let pass.

    Args:
        model (nn.Module): a model, wrapped for several processes or not.
        checkpoint (dict): as :func:`~soft_mm.checkpoints.load_weights` gives it.
        path (str): its file, for the message.

    Returns:
        dict[str, Tensor]: the weights, by the names of the model.

    Raises:
        ValueError: if weights are missing or of another shape, position embeddings excepted, which are resized.
    """
    found = {key.removeprefix('module.'): value for key, value in checkpoint.get('state_dict', checkpoint).items()}
    target = (model.module if is_model_wrapper(model) else model).state_dict()
    missing = [key for key in target if key not in found]
    misshapen = [
        f'{key} {tuple(found[key].shape)} for {tuple(value.shape)}'
        for key, value in target.items()
        if key in found and found[key].shape != value.shape and not key.endswith('.pos_embed')
    ]
    if missing or misshapen:
        raise ValueError(
            f'{path} is not of the model of this config: of {len(target)} weights {len(missing)} are missing '
            f'{missing[:3]} and {len(misshapen)} of another shape {misshapen[:3]}; give the config it was trained with'
        )
    return found


def load_whole_model(path):
    """Read the checkpoint of a whole model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, see :func:`~soft_mm.checkpoints.load_weights`, or is of safetensors, which
            mmengine's runner and the inferencers do not read.
    """
    if str(path).endswith('.safetensors'):
        raise ValueError(f'{path}: the toolboxes read whole models from .pth alone; convert it to one')
    return load_weights(str(path))


def predict(images, config, checkpoint, out_dir, device=None, score_thr=0.3):
    """Draw predictions for images: class scores, boxes and masks, or a segmentation.

    Args:
        images (list[str]): image files.
        config (str | Path): config file of mmpretrain, mmdet or mmsegmentation.
        checkpoint (str | Path): its checkpoint.
        out_dir (str | Path): folder in which ``vis`` is filled with one picture an image.
        device (str | None): ``'cpu'``, ``'cuda'`` or ``'cuda:i'``. Defaults to None, a GPU where there is one.
        score_thr (float): boxes below this score are not drawn. Defaults to 0.3.

    Returns:
        Path: the folder of the pictures.

    Raises:
        ValueError: if the config is of another toolbox, the checkpoint of another model or not to be read, or pictures
            would have the same name.
    """
    cfg, checkpoint, pictures = Config.fromfile(config), str(checkpoint), Path(out_dir, 'vis')
    # Before the inferencers read it, which would run code from it.
    weights = load_whole_model(checkpoint)
    scope = cfg.get('default_scope')
    if scope not in ('mmpretrain', 'mmdet', 'mmseg'):
        raise ValueError(f'{config} has default_scope {scope!r}; mmpretrain, mmdet and mmseg have predictions to draw')
    # Another toolbox may have been used in this process.
    init_default_scope(scope)
    # The checkpoint has every weight.
    cfg.model.backbone.init_cfg = None
    if scope == 'mmpretrain':
        from mmpretrain.apis import ImageClassificationInferencer

        names = [Path(image).with_suffix('').name for image in images]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'several images are called {twice[:3]} but for their endings, as their pictures would be')
        inferencer = ImageClassificationInferencer(cfg, pretrained=checkpoint, device=device)
        options = dict(show_dir=str(pictures))
    elif scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(cfg, weights=checkpoint, device=device)
        options = dict(out_dir=str(out_dir), pred_score_thr=score_thr)
    else:
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(cfg, weights=checkpoint, device=device)
        options = dict(out_dir=str(out_dir))
    check_weights(inferencer.model, weights, checkpoint)
    pictures.mkdir(parents=True, exist_ok=True)
    inferencer(images, **options)
    return pictures
