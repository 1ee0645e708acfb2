"""photo-digits as data sets for mmpretrain, mmdet and mmsegmentation, composed on the fly."""

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from soft_mm.ops.checks import check_choice

from .generators import CropGenerator, SceneGenerator
from .sources import CLASSES, PALETTE

ANNOTATIONS = ('instances', 'semantic')
_METAINFO = {
    'instances': dict(classes=CLASSES, palette=list(PALETTE)),
    'semantic': dict(
        classes=('background', *CLASSES),
        palette=[(0, 0, 0), *PALETTE],
    ),
}


def encode_mask(mask):
    """Encode a mask in the run-length code of COCO.

    Args:
        mask (np.ndarray): (H, W) bool.

    Returns:
        dict: ``size`` [H, W] and ``counts``, an ASCII string, as in JSON files of COCO.

    Raises:
        ImportError: If pycocotools is not installed.
    """
    from pycocotools import mask as mask_utils

    code = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=list(code['size']), counts=code['counts'].decode('ascii'))


class _PhotoDigits(BaseDataset):
    """Base class of both data sets. A generator of ``generator_class`` composes the samples."""

    annotations = 'instances'
    generator_class: type

    def __init__(
        self,
        split='train',
        length=1000,
        seed=0,
        generator=None,
        metainfo=None,
        pipeline=(),
        filter_cfg=None,
        indices=None,
        serialize_data=True,
        test_mode=False,
        lazy_init=False,
        max_refetch=1000,
    ):
        self.generator = self.generator_class(split, seed, length=length, **(generator or {}))
        own = _METAINFO[self.annotations]
        metainfo = {**own, **(metainfo or {})}
        if len(metainfo['classes']) != len(own['classes']):
            raise ValueError(
                f'metainfo: classes={metainfo["classes"]!r}: expected names for {len(own["classes"])} classes'
            )
        super().__init__(
            metainfo=metainfo,
            pipeline=list(pipeline),
            filter_cfg=filter_cfg,
            indices=indices,
            serialize_data=serialize_data,
            test_mode=test_mode,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
        )

    def load_data_list(self):
        """List the samples. Their pixels are generated when a sample is requested.

        Returns:
            list[dict]: ``index``, ``img_path`` (a name, not a file), ``height`` and ``width`` of each sample.
        """
        self.generator.load_sources()  # before worker processes are forked, so that they share the memory
        height, width = self.generator.size
        prefix = f'photo-digits/{self.generator.split}/{self.generator.kind}'
        return [
            dict(index=index, img_path=f'{prefix}/{index:06d}', height=height, width=width)
            for index in range(self.generator.length)
        ]

    def get_data_info(self, idx):
        """Generate a sample.

        Args:
            idx (int): Position in the data set.

        Returns:
            dict: The sample in the form that the toolboxes' ``LoadImageFromFile`` produces.
        """
        info = super().get_data_info(idx)
        info.update(self._compose(info.pop('index')))
        info['img_shape'] = info['ori_shape'] = info['img'].shape[:2]
        return info


@DATASETS.register_module()
class PhotoDigitsCrops(_PhotoDigits):
    """Crops with one digit each, for classification with mmpretrain.

    A sample holds ``img`` (H, W, 3) uint8 BGR, ``gt_label``, ``img_shape``, ``ori_shape``, ``sample_idx`` and
    ``img_path``. All samples of an epoch differ, but every epoch has the same samples. To avoid repetition, set
    ``length`` to the number of samples of the whole training.

    Args:
        split (str): ``'train'`` or ``'val'``.
        length (int): Number of samples.
        seed (int): Seed, at least 0. Another seed gives other samples.
        generator (dict, optional): Options of :class:`CropGenerator`: ``size``, ``digit_size``, ``max_angle``,
            ``background``, ``recolour``, ``min_contrast``. A ``background`` that changes over the data set needs a
            sampler that does not shuffle.
        metainfo, pipeline, filter_cfg, indices, serialize_data, test_mode, lazy_init, max_refetch: As in
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        ImportError: If scikit-learn or scikit-image is not installed.
        TypeError: If an option is unknown.
        ValueError: If an option has an invalid value.
    """

    generator_class = CropGenerator

    def _compose(self, index):
        image, label = self.generator.generate(index)
        return dict(img=image, gt_label=label)


@DATASETS.register_module()
class PhotoDigitsScenes(_PhotoDigits):
    """Scenes with several digits, for mmdet or mmsegmentation.

    A sample holds ``img`` (H, W, 3) uint8 BGR, ``img_shape``, ``ori_shape``, ``height``, ``width``, ``img_id``,
    ``sample_idx`` and ``img_path``. The value of ``annotations`` adds:

    - ``'instances'``: ``instances`` for mmdet's ``LoadAnnotations(with_bbox=True, with_mask=True)``. There are ten
      classes.
    - ``'semantic'``: ``gt_seg_map`` (H, W) uint8, ``seg_fields``, ``label_map`` and ``reduce_zero_label``, in the form
      that mmsegmentation's ``LoadAnnotations`` produces. There are ``background`` and ten classes. A resize would also
      resize the ground truth, so an evaluation pipeline must not resize.

    A pipeline must not load the image, because the sample already holds it. See :class:`PhotoDigitsCrops` about
    repeated samples.

    Args:
        split (str): ``'train'`` or ``'val'``.
        length (int): Number of samples.
        seed (int): Seed, at least 0. Another seed gives other samples.
        annotations (str): ``'instances'`` or ``'semantic'``.
        generator (dict, optional): Options of :class:`SceneGenerator`: ``size``, ``num_digits``, ``digit_size``,
            ``max_angle``, ``background``, ``recolour``, ``min_contrast``, ``gap``.
        filter_cfg (dict, optional): As in :class:`mmengine.dataset.BaseDataset`. No scene is filtered, because every
            scene has at least one digit.
        metainfo, pipeline, indices, serialize_data, test_mode, lazy_init, max_refetch: As in
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        ImportError: If scikit-learn or scikit-image is not installed. For ``'instances'`` also if pycocotools is not
            installed, when a sample is read.
        TypeError: If an option is unknown.
        ValueError: If an option has an invalid value.
    """

    generator_class = SceneGenerator

    def __init__(self, split='train', length=1000, seed=0, annotations='instances', **kwargs):
        check_choice('annotations', annotations, ANNOTATIONS)
        self.annotations = annotations
        super().__init__(split, length, seed, **kwargs)

    def _compose(self, index):
        scene = self.generator.generate(index)
        sample = dict(img=scene.image, img_id=index)
        if self.annotations == 'semantic':
            return dict(
                sample,
                gt_seg_map=scene.semantic,
                seg_fields=['gt_seg_map'],
                label_map=None,
                reduce_zero_label=False,
            )
        instances = [
            dict(bbox=box.tolist(), bbox_label=int(label), ignore_flag=0, mask=encode_mask(mask))
            for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True)
        ]
        return dict(sample, instances=instances)
