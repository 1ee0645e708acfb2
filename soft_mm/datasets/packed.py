"""Crops of photo-digits in one file, for trainings that all see the same: to compose them takes longer than to read."""

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from soft_mm.registry import DATASETS

from .photo_digits import CLASSES, PALETTE, CropGenerator


def pack_crops(folder, seed, length, **options):
    """Write crops of the training split into one file, unless it is there.

    Args:
        folder (str | Path): folder of the file; made if missing.
        seed (int): of the crops.
        length (int): how many.
        **options: further ones of :class:`CropGenerator`.

    Returns:
        Path: the file, named by what is in it.

    Raises:
        ImportError: if scikit-learn or scikit-image is not installed.
        TypeError: for an unknown option.
        ValueError: for an option outside of what is allowed.
    """
    generator = CropGenerator('train', seed, length=length, **options)
    contents = dict(generator.options, opencv=cv2.__version__, numpy=np.__version__)
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    file = Path(folder) / f'crops_{digest[:16]}.npy'
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone, for another may be writing the same.
    part = file.with_suffix(f'.{os.getpid()}.part')
    kind = [('image', np.uint8, (*generator.size, 3)), ('label', np.int64)]
    samples = np.lib.format.open_memmap(part, 'w+', dtype=kind, shape=(length,))
    for index in range(length):
        samples[index] = generator.generate(index)
    samples.flush()
    # Interrupted, it leaves no file that looks whole.
    part.replace(file)
    return file


@DATASETS.register_module()
class PackedCrops(BaseDataset):
    """Crops from a file of :func:`pack_crops`, in their order, for classification with mmpretrain.

    Results hold ``img`` (H, W, 3) uint8 BGR, ``gt_label``, ``img_shape``, ``ori_shape`` and ``sample_idx``.

    Args:
        ann_file (str): the file.
        metainfo, data_root, pipeline, filter_cfg, indices, serialize_data, test_mode, lazy_init, max_refetch: As in
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    METAINFO = dict(classes=CLASSES, palette=list(PALETTE))

    def load_data_list(self):
        """List the samples by their place in the file; pixels are read when a sample is asked for."""
        samples = np.load(self.ann_file, mmap_mode='r')
        self.images = samples['image']
        return [dict(index=index, gt_label=int(label)) for index, label in enumerate(samples['label'])]

    def get_data_info(self, idx):
        """Read a sample.

        Args:
            idx (int): Position in the data set.

        Returns:
            dict: What a pipeline takes after the loading of the image.
        """
        info = super().get_data_info(idx)
        image = np.array(self.images[info.pop('index')])
        return dict(info, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
