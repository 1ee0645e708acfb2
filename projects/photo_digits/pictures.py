"""Figures of trained models: loss curves, predictions next to the ground truth, and rows of the attention."""

import base64
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from projects.common.run_logs import read_losses
from soft_mm.attention_maps import draw_attention, image_attention, local_window
from soft_mm.inference import load_model, read_image
from soft_mm.utils import make_figure, read_config

# The smallest score of a box that mmdet's visualizer draws.
_SCORE = 0.3
# A class is named as found by a segmentor if it covers this part of the picture.
_SHARE = 0.001
_STAGE = 2


@dataclass(frozen=True)
class Picture:
    """Encoded picture.

    Attributes:
        content (bytes): JPEG.
        width (int): Width in pixels.
        height (int): Height in pixels.
        alt (str): Text that replaces the picture.
        caption (str): Caption.
    """

    content: bytes
    width: int
    height: int
    alt: str
    caption: str

    @property
    def uri(self):
        """str: The picture as a data URI."""
        return f'data:image/jpeg;base64,{base64.b64encode(self.content).decode()}'


def encode_picture(image, alt, caption):
    """Encode a picture as JPEG.

    Args:
        image (np.ndarray): ``(H, W, 3)`` uint8, BGR.
        alt (str): Text that replaces the picture.
        caption (str): Caption.

    Returns:
        Picture: The picture.
    """
    content = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
    return Picture(content, image.shape[1], image.shape[0], alt, caption)


def draw_loss_curves(work_dirs, out_file):
    """Draw the training loss of several runs, with one panel per run.

    Args:
        work_dirs (dict[str, str | Path]): Maps the title of each run to its work dir.
        out_file (str | Path): Picture to write.
    """
    figure, axes = make_figure(1, len(work_dirs), (4.5 * len(work_dirs), 3.5))
    for axis, (title, work_dir) in zip(axes[0], work_dirs.items()):
        losses = read_losses(work_dir)
        axis.plot([step for step, _ in losses], [loss for _, loss in losses])
        axis.set(title=title, xlabel='iteration', ylabel='loss', ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(out_file, dpi=120)


def draw_predictions(config, checkpoint, out_file, count=8, columns=2):
    """Draw the first test images of a detector or segmentor, each with ground truth (left) and prediction (right).

    The visualizer of the toolbox draws them. mmengine shares visualizers of the same name within a process, so a
    process must call this function for one toolbox only.

    Args:
        config (str | Path): Config of mmdet or mmsegmentation.
        checkpoint (str | Path): Checkpoint of its model.
        out_file (str | Path): Picture to write, with all images.
        count (int): Number of images. Defaults to 8.
        columns (int): Number of images per row. Defaults to 2.

    Returns:
        list[Picture]: One picture per image, whose caption names the classes.
    """
    cfg = read_config(config)
    with TemporaryDirectory() as folder:
        cfg.work_dir = folder
        drawn = _draw_tiles(cfg, checkpoint, count)
    tiles = [tile for tile, _ in drawn]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    mmcv.imwrite(np.concatenate(rows), str(out_file))
    return [encode_picture(tile, f'Ground truth and prediction. {caption}', caption) for tile, caption in drawn]


def _draw_tiles(cfg, checkpoint, count):
    cfg.load_from = str(checkpoint)
    cfg.visualizer.vis_backends = []
    if cfg.default_scope == 'mmseg':
        # The background's colour is black: with the default of 0.8, the photograph is hardly visible.
        cfg.visualizer.alpha = 0.65
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    dataset = runner.test_dataloader.dataset
    runner.visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    tiles = []
    for index in range(min(count, len(dataset))):
        with torch.no_grad():
            sample = runner.model.test_step(pseudo_collate([dataset[index]]))[0]
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        # mmseg's visualizer keeps only the second drawing in memory, but writes both to the file.
        tile = f'{cfg.work_dir}/{index}.png'
        runner.visualizer.add_datasample('', image, sample, draw_gt=True, draw_pred=True, out_file=tile)
        tiles.append((mmcv.imread(tile), _caption(sample, dataset.metainfo['classes'])))
    return tiles


def _caption(sample, classes):
    if 'gt_instances' in sample:
        found = sample.pred_instances[sample.pred_instances.scores > _SCORE]
        labels = [instances.labels.tolist() for instances in (sample.gt_instances, found)]
    else:
        maps = [part.data.flatten() for part in (sample.gt_sem_seg, sample.pred_sem_seg)]
        shares = [torch.bincount(part, minlength=len(classes))[: len(classes)] / len(part) for part in maps]
        # Class 0 is the background.
        labels = [[label for label in range(1, len(classes)) if share[label] >= _SHARE] for share in shares]
    truth, found = (', '.join(classes[label] for label in sorted(part)) or 'none' for part in labels)
    return f'Digits: {truth}. Found: {found}.'


def draw_attention_rows(config, checkpoint, out_file, scenes):
    """Draw the rows of the attention of two pixels of a validation scene: one on a digit, one far from all digits.

    Args:
        config (str | Path): Config of a model with a SOFT backbone.
        checkpoint (str | Path): Checkpoint of the model.
        out_file (str | Path): Picture to write.
        scenes (str | Path): Folder of a split's scenes, see
            :func:`~projects.photo_digits.dataset_files.export_photo_digits`.

    Returns:
        Picture: The same picture.
    """
    name, points = choose_queries(scenes)
    image = read_image(Path(scenes, 'images', name))
    model = load_model(config, checkpoint)
    rows, mean = (image_attention(model, image, queries, _STAGE) for queries in (points, None))
    window = local_window(model, _STAGE)
    draw_attention(image, rows, points, out_file, mean=mean, window=window)
    caption = (
        f'What two pixels of scene {Path(name).stem} attend to in the last block of stage {_STAGE} of the detector: '
        "their rows of the attention matrix. A map's title has the multiple of the head's mean row that is closest to "
        'the row, and its colours show the rest, in mean weights. Red: more than the average pixel; blue: less. The '
        'ring marks the query.'
    )
    if window:
        caption += (
            f' The maps are without the local branch, a convolution over the {window}x{window} tokens in the dashed '
            'square.'
        )
    alt = 'Two rows of maps over a scene, for a pixel on a digit and for a pixel of the background.'
    return encode_picture(mmcv.imread(out_file), alt, caption)


def choose_queries(scenes, count=8):
    """Choose two pixels that are far apart in content: one on the largest digit of the first scenes, one off digits.

    Args:
        scenes (str | Path): See :func:`draw_attention_rows`.
        count (int): Number of scenes to choose from. Defaults to 8.

    Returns:
        tuple[str, list[tuple[int, int]]]: File name of the scene, and the pixels ``(x, y)``.
    """
    best = None
    for file in sorted(Path(scenes, 'semantic').glob('*.png'))[:count]:
        labels = mmcv.imread(file, flag='unchanged')
        label = np.bincount(labels.flat)[1:].argmax() + 1
        # The border counts as outside, so that no query is at the edge.
        digit, background = (
            cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
            for mask in (labels == label, labels == 0)
        )
        if best is None or digit.max() > best[0]:
            best = digit.max(), file.name, [_peak(digit), _peak(background)]
    return best[1:]


def _peak(distances):
    y, x = np.unravel_index(distances.argmax(), distances.shape)
    return int(x), int(y)
