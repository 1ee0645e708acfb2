"""Crops packed into one file equal those of the generator."""

import numpy as np
import pytest

from projects.photo_digits import CropGenerator, PackedCrops
from projects.photo_digits.packed import pack_crops

OPTIONS = dict(size=(24, 32), background=(0.0, 0.5), recolour=0.8)


def test_packed_crops_equal_those_of_the_generator_in_order(tmp_path):
    file = pack_crops(tmp_path / 'packed', 3, 5, **OPTIONS)
    generator = CropGenerator('train', 3, length=5, **OPTIONS)
    dataset = PackedCrops(ann_file=str(file))
    assert len(dataset) == 5
    for index in range(5):
        image, label = generator.generate(index)
        sample = dataset[index]
        assert np.array_equal(sample['img'], image) and sample['gt_label'] == label
        assert sample['img_shape'] == sample['ori_shape'] == (24, 32) and sample['sample_idx'] == index
        # A transform may write into the image of a sample.
        sample['img'][:] = 0
    assert np.array_equal(dataset[4]['img'], generator.generate(4)[0])


def test_a_file_is_written_once_and_its_name_depends_on_all_options(tmp_path):
    file = pack_crops(tmp_path, 0, 2, size=16)
    written = file.stat().st_mtime_ns
    assert pack_crops(tmp_path, 0, 2, size=16) == file and file.stat().st_mtime_ns == written
    others = [pack_crops(tmp_path, 1, 2, size=16), pack_crops(tmp_path, 0, 3, size=16), pack_crops(tmp_path, 0, 2)]
    assert len({file, *others}) == 4 == len(list(tmp_path.iterdir()))


def test_errors_name_the_option(tmp_path):
    with pytest.raises(ValueError, match='size'):
        pack_crops(tmp_path, 0, 2, size=4)
    with pytest.raises(TypeError, match='colour'):
        pack_crops(tmp_path, 0, 2, colour=1)
    with pytest.raises(FileNotFoundError):
        PackedCrops(ann_file=str(tmp_path / 'none.npy'))
    assert not list(tmp_path.iterdir())
