"""Crops of photo-digits in one file, which is faster to read than to compose again for every training."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from soft_mm.utils import atomic_path

from .generators import CropGenerator
from .sources import CLASSES, PALETTE


def pack_crops(folder, seed, length, **options):
    """Write crops of the training split to one file. An existing file with the same crops is kept.

    Args:
        folder (str | Path): Folder of the file. It is created if it is missing.
        seed (int): Seed of the crops.
        length (int): Number of crops.
        **options: Further options of :class:`CropGenerator`.

    Returns:
        Path: The file. Its name depends on all options and on the versions of OpenCV and NumPy, so that it identifies
        the crops.

    Raises:
        ImportError: If scikit-learn or scikit-image is not installed.
        TypeError: If an option is unknown.
        ValueError: If an option has an invalid value.
    """
    generator = CropGenerator('train', seed, length=length, **options)
    contents = dict(generator.options, opencv=cv2.__version__, numpy=np.__version__)
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    file = Path(folder) / f'crops_{digest[:16]}.npy'
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    dtype = [('image', np.uint8, (*generator.size, 3)), ('label', np.int64)]
    with atomic_path(file) as temporary:
        samples = np.lib.format.open_memmap(temporary, 'w+', dtype=dtype, shape=(length,))
        for index in range(length):
            samples[index] = generator.generate(index)
        samples.flush()
    return file


@DATASETS.register_module()
class PackedCrops(BaseDataset):
    """Crops from a file of :func:`pack_crops`, in their order, for classification with mmpretrain.

    A sample holds ``img`` (H, W, 3) uint8 BGR, ``gt_label``, ``img_shape``, ``ori_shape`` and ``sample_idx``.

    Args:
        ann_file (str): File to read.
        metainfo, data_root, pipeline, filter_cfg, indices, serialize_data, test_mode, lazy_init, max_refetch: As in
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        FileNotFoundError: If the file does not exist.
    """

    METAINFO = dict(classes=CLASSES, palette=list(PALETTE))

    def load_data_list(self):
        """List the samples with their labels. Their pixels are read when a sample is requested.

        Returns:
            list[dict]: ``index`` and ``gt_label`` of each sample.
        """
        samples = np.load(self.ann_file, mmap_mode='r')
        self.images = samples['image']
        return [dict(index=index, gt_label=int(label)) for index, label in enumerate(samples['label'])]

    def get_data_info(self, idx):
        """Read a sample.

        Args:
            idx (int): Position in the data set.

        Returns:
            dict: The sample in the form that mmpretrain's ``LoadImageFromFile`` produces.
        """
        info = super().get_data_info(idx)
        image = np.array(self.images[info.pop('index')])  # a copy, because transforms may change it in place
        return dict(info, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
