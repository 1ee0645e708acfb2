"""The configs: they parse, train from the classifier's checkpoint, evaluate and draw predictions."""

import json

import mmcv
import pytest
import torch
from digits_workspace import CLASSIFIER, CONFIGS, DENSE, DETECTOR, ROOT

from projects.photo_digits import CLASSES, PALETTE
from soft_mm.utils import read_config


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_names_its_scope(config):
    cfg = read_config(config)
    assert cfg.default_scope in ('mmpretrain', 'mmdet', 'mmseg')
    assert cfg.model.backbone.type == 'soft_mm.SOFT'
    end = max(scheduler.end for scheduler in cfg.param_scheduler)
    assert end == cfg.train_cfg.max_iters == cfg.train_cfg.val_interval


@pytest.mark.parametrize('config', DENSE, ids=lambda path: path.stem)
def test_classes_and_colours_equal_those_of_the_data_set(config):
    metainfo = read_config(config).val_dataloader.dataset.metainfo
    # A config repeats them, because it cannot import them. mmsegmentation's classes begin with the background.
    assert tuple(metainfo.classes[-10:]) == CLASSES and tuple(metainfo.palette[-10:]) == PALETTE


@pytest.mark.parametrize('config', DENSE, ids=lambda path: path.stem)
def test_dense_config_trains_from_the_classifier_and_evaluates(config, workspace, classifier, train, run):
    # After two iterations all scores of a detector are low. Without detections there would be no metrics.
    options = [] if config.stem.startswith('fpn') else ['model.test_cfg.rcnn.score_thr=0.0']
    code, log = train(config, f'model.backbone.init_cfg.checkpoint={classifier}', *options)
    assert code == 0, log[-3000:]
    keys = sum(key.startswith('backbone.') for key in torch.load(classifier, weights_only=False)['state_dict'])
    assert f'SOFT: all {keys} backbone keys loaded from {classifier}' in log
    assert ('mIoU' if config.stem.startswith('fpn') else 'bbox_mAP') in log
    draw = f"""
from projects.photo_digits.pictures import draw_predictions
drawn = draw_predictions({str(config)!r}, 'work_dirs/{config.stem}/iter_2.pth', 'picture.png', count=3, columns=2)
for index, picture in enumerate(drawn):
    open(f'scene{{index}}.jpg', 'wb').write(picture.content)
    print(f'scene {{index}}: {{picture.width}}x{{picture.height}}, {{picture.alt}}')
"""
    code, log = run('-c', draw)
    assert code == 0, log[-3000:]
    annotations = json.loads((workspace / 'data/photo_digits_demo/annotations/instances_val.json').read_text())
    for index, image in enumerate(annotations['images']):
        names = [CLASSES[a['category_id'] - 1] for a in annotations['annotations'] if a['image_id'] == image['id']]
        truth = ', '.join(sorted(names if config == DETECTOR else set(names)))
        assert f'scene {index}: 512x256, Ground truth and prediction. Digits: {truth}. Found: ' in log
    picture = mmcv.imread(workspace / 'picture.png')
    # Two rows of two scenes of 256 pixels, each with its prediction on the right. The last place is empty.
    assert picture.shape == (512, 1024, 3) and not picture[256:, 512:].any() and picture[:, :512].std() > 10
    # The scenes alone, as JPEG.
    assert abs(mmcv.imread(workspace / 'scene1.jpg').astype(float) - picture[:256, 512:]).mean() < 5
    assert not list(workspace.glob('picture.png?*'))


def test_training_resumes_and_test_tool_evaluates(workspace, classifier, train, run):
    code, log = train(CLASSIFIER, 'train_cfg.max_iters=3', 'train_cfg.val_interval=3', resume=True)
    assert code == 0 and 'resumed epoch: 0, iter: 2' in log, log[-3000:]
    checkpoint = workspace / 'work_dirs' / CLASSIFIER.stem / 'iter_3.pth'
    assert checkpoint.is_file()
    options = ['--json', 'metrics.json', '--cfg-options', 'test_dataloader.num_workers=0']
    code, log = run(ROOT / 'tools/test.py', CLASSIFIER, checkpoint, *options)
    assert code == 0, log[-3000:]
    assert 0 <= json.loads((workspace / 'metrics.json').read_text())['accuracy/top1'] <= 100


def test_checkpoint_of_another_arch_stops_the_training(classifier, train):
    code, log = train(DENSE[0], f'model.backbone.init_cfg.checkpoint={classifier}', 'model.backbone.arch=small')
    assert code != 0
    assert 'does not fit this SOFT backbone' in log.splitlines()[-1]
