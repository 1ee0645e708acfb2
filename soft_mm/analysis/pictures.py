"""Pictures of what was trained: loss curves, and predictions beside ground truth."""

from tempfile import TemporaryDirectory

import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from .logs import read_scalars


def draw_loss_curves(work_dirs, out_file):
    """Draw the training loss of several runs against the iteration, one panel each.

    Args:
        work_dirs (dict[str, str | Path]): title to work dir.
        out_file (str | Path): picture to write.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(work_dirs), figsize=(4.5 * len(work_dirs), 3.5), squeeze=False, layout='constrained'
    )
    for axis, (title, work_dir) in zip(axes[0], work_dirs.items()):
        records = [record for record in read_scalars(work_dir) if 'loss' in record]
        axis.plot([record['step'] for record in records], [record['loss'] for record in records])
        axis.set(title=title, xlabel='iteration', ylabel='loss', ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(out_file, dpi=120)
    plt.close(figure)


def draw_predictions(config, checkpoint, out_file, count=8, columns=2):
    """Draw the first test images of a detector or segmentor, ground truth on the left of each and prediction on the
    right.

    Drawing is left to the toolbox's own visualizer. Run one toolbox a process: visualizers of the same name are
    shared in one.

    Args:
        config (str | Path): config file of mmdet or mmsegmentation.
        checkpoint (str | Path): its checkpoint.
        out_file (str | Path): picture to write.
        count (int): number of images. Defaults to 8.
        columns (int): images side by side. Defaults to 2.
    """
    cfg = Config.fromfile(config)
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
        # mmseg's visualizer keeps only the last of the two drawings in memory, and writes both.
        tile = f'{cfg.work_dir}/{index}.png'
        runner.visualizer.add_datasample('', image, sample, draw_gt=True, draw_pred=True, out_file=tile)
        tiles.append(mmcv.imread(tile))
    return tiles
