"""Figures of trained models: loss curves, and predictions next to the ground truth."""

from tempfile import TemporaryDirectory

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from projects.common.run_logs import read_scalars
from soft_mm.utils import make_figure, read_config


def draw_loss_curves(work_dirs, out_file):
    """Draw the training loss of several runs, with one panel per run.

    Args:
        work_dirs (dict[str, str | Path]): Maps the title of each run to its work dir.
        out_file (str | Path): Picture to write.
    """
    figure, axes = make_figure(1, len(work_dirs), (4.5 * len(work_dirs), 3.5))
    for axis, (title, work_dir) in zip(axes[0], work_dirs.items()):
        records = [record for record in read_scalars(work_dir) if 'loss' in record]
        axis.plot([record['step'] for record in records], [record['loss'] for record in records])
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
        out_file (str | Path): Picture to write.
        count (int): Number of images. Defaults to 8.
        columns (int): Number of images per row. Defaults to 2.
    """
    cfg = read_config(config)
    with TemporaryDirectory() as folder:
        cfg.work_dir = folder
        tiles = _draw_tiles(cfg, checkpoint, count)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    mmcv.imwrite(np.concatenate(rows), str(out_file))


def _draw_tiles(cfg, checkpoint, count):
    cfg.load_from = str(checkpoint)
    cfg.visualizer.vis_backends = []
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
        tiles.append(mmcv.imread(tile))
    return tiles
