"""The demo's page: its parts, what it says where something is missing, and that the file needs nothing else."""

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from digits_workspace import OPTIONS, ROOT
from mmengine.config import Config

from benchmarks.__main__ import build_parser
from benchmarks.targets import parse_target
from projects.photo_digits.demo_page import STEPS, processor_name, write_report
from projects.photo_digits.pictures import encode_picture
from soft_mm.runner import runner_parser
from soft_mm.utils import build_model, without_pretrained

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
SUMMARY = dict(
    classification=dict(top1=0.9213, seconds=692.4),
    detection=dict(bbox_mAP=0.5, bbox_mAP_50=0.8613, segm_mAP=0.4, segm_mAP_50=0.8124, seconds=978.0),
    segmentation=dict(mIoU=0.6234, seconds=61.0),
    versions=dict(python='3.11.2', torch='2.8.0', soft_mm='1.2.3'),
)
LOSSES = {
    'classification': [(step, 2.4 / step) for step in range(10, 200, 10)],
    'detection': [(10, 3.0), (20, 1.5)],
    'segmentation': [(10, 2.0), (20, float('nan')), (30, 0.5)],
}


class Page(HTMLParser):
    """Elements of a page as ``(tag, attributes)``, and its text. Raises an error if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.source, self.elements, self.open, self.texts = text, [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r'\s+', ' ', ' '.join(self.texts))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def section(self, name):
        """Return the section with an id as a page of its own."""
        return Page(re.search(rf'<section id="{name}".*?</section>', self.source, re.DOTALL)[0])


def pictures(count, caption='Digits: 3. Found: 3.'):
    images = np.random.default_rng(0).integers(0, 255, (count, 16, 32, 3), dtype=np.uint8)
    return [encode_picture(image, f'Ground truth and prediction. {caption}', caption) for image in images]


def write(folder, summary=SUMMARY, losses=LOSSES, scenes=None, attention='default'):
    scenes = {name: pictures(8) for name in ('detection', 'segmentation')} if scenes is None else scenes
    attention = pictures(1, 'Rows of two pixels.')[0] if attention == 'default' else attention
    write_report(folder / 'report.html', summary, losses, scenes, attention)
    return Page((folder / 'report.html').read_text(encoding='utf-8'))


def test_page_has_every_part(tmp_path):
    page = write(tmp_path)
    metrics = page.section('metrics').text
    for part in (
        'classification top-1 accuracy 0.921 11.5',
        'detection box mAP 0.500 16.3 box mAP_50 0.861',
        'mask mAP_50 0.812',
        'segmentation mIoU, background included 0.623 1.0',
        'interrupted runs included: 28.9 in total.',
    ):
        assert part in metrics
    assert len(page.section('losses').all('polyline')) == 3
    for name in ('detection', 'segmentation'):
        assert len(page.section(name).all('img')) == 8 and 'Found: 3.' in page.section(name).text
    assert len(page.section('attention').all('img')) == 1 and 'Rows of two pixels.' in page.section('attention').text
    assert all(step['command'] in page.section('next').text for step in STEPS) and len(STEPS) == 3
    versions = page.section('versions').text
    assert all(text in versions for text in ('torch 2.8.0', 'soft_mm 1.2.3', f'processor {processor_name()}'))
    assert 'vultilion' in page.text and 'CC BY 2.0' in page.text and 'missing' not in str(page.elements)


def test_curves_are_drawn_to_scale(tmp_path):
    page = write(tmp_path, losses=dict(LOSSES, detection=[(10, 4.0), (20, 1.0), (40, 2.0)]))
    points = [[float(number) for number in point.split(',')] for point in page.all('polyline')[1]['points'].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    # Proportional to the iterations and to the losses.
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 3, abs=0.01)
    assert (y1 - y2) / (y1 - y0) == pytest.approx(1 / 3, abs=0.01)
    assert 'Loss per iteration: 4.000 at iteration 10, 2.000 at iteration 40.' in page.section('losses').text
    assert (
        '2.000 at iteration 10, 0.500 at iteration 30. Left out because they are not finite: 1.'
        in page.section('losses').text
    )


def test_page_needs_nothing_else(tmp_path):
    page = write(tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'use', 'image'}
    for _, attributes in page.elements:
        assert not any(name.startswith('on') or name in ('srcset', 'xlink:href', 'action') for name in attributes)
        assert attributes.get('src', 'data:image/').startswith('data:image/')
        assert attributes.get('href', '#').startswith('#')
    assert 'url(' not in page.source and '@import' not in page.source
    (policy,) = [meta['content'] for meta in page.all('meta') if meta.get('http-equiv') == 'Content-Security-Policy']
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_page_is_accessible(tmp_path):
    page = write(tmp_path)
    assert page.all('html') == [{'lang': 'en'}] and len(page.all('h1')) == len(page.all('main')) == 1
    assert 'width=device-width' in next(meta for meta in page.all('meta') if meta.get('name') == 'viewport')['content']
    assert all(image['alt'] and int(image['width']) > 0 and int(image['height']) > 0 for image in page.all('img'))
    assert all(chart['role'] == 'img' and chart['aria-label'] for chart in page.all('svg'))
    assert all(cell.get('scope') in ('col', 'row', 'rowgroup') for cell in page.all('th')) and page.all('th')
    assert len(page.all('caption')) == len(page.all('table')) == 2
    ids = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
    assert len(ids) == len(set(ids))
    assert {link['href'][1:] for link in page.all('a')} == {section['id'] for section in page.all('section')}
    assert {section['aria-labelledby'] for section in page.all('section')} <= set(ids)
    # Areas that scroll can be reached by the keyboard.
    assert all(
        attributes.get('tabindex') == '0' for _, attributes in page.elements if attributes.get('class') == 'scroll'
    )


def test_colours_have_enough_contrast_in_both_schemes(tmp_path):
    schemes = re.findall(r':root \{(.*?)\}', write(tmp_path).source, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r'--(\w+): (#[0-9a-f]{6});', scheme))
        for text in ('text', 'quiet', 'accent'):
            for ground in ('page', 'panel'):
                first, second = sorted((luminance(colours[text]), luminance(colours[ground])))
                assert (second + 0.05) / (first + 0.05) >= 4.5, (text, ground)


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_values_are_escaped(tmp_path):
    evil = '<script>alert("1")</script>'
    summary = dict(SUMMARY, versions={evil: evil}, **{evil: {evil: 0.5}})
    scenes = {'detection': pictures(1, evil), evil: pictures(1, evil)}
    page = write(tmp_path, summary, {evil: [(1, 1.0)]}, scenes, pictures(1, evil)[0])
    assert page.all('script') == [] and '<script' not in page.source
    # In the text of each place, as it was given.
    assert page.text.count(evil) >= 6 and page.all('img')[0]['alt'] == f'Ground truth and prediction. {evil}'


def test_missing_results_are_named(tmp_path):
    summary = dict(SUMMARY, segmentation=dict(mIoU=0.5))
    scenes = dict(detection=pictures(8), segmentation=[])
    page = write(tmp_path, summary, dict(LOSSES, detection=[]), scenes, None)
    assert 'mIoU, background included 0.500 unknown' in page.text and 'in total' not in page.text
    assert len(page.all('polyline')) == 2
    assert 'detection No training losses: the logs of this part hold none.' in page.section('losses').text
    assert 'No pictures: the demo drew no scenes of this part.' in page.section('segmentation').text
    assert 'No picture: the demo drew no rows of attention.' in page.section('attention').text


def test_failed_page_keeps_the_old_one(tmp_path):
    write(tmp_path)
    before = (tmp_path / 'report.html').read_bytes()
    with pytest.raises(KeyError, match='versions'):
        write(tmp_path, {name: SUMMARY[name] for name in ('detection', 'segmentation')})
    assert (tmp_path / 'report.html').read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ['report.html']


def arguments_of(step, program):
    words = shlex.split(step['command'])
    assert words[: len(program)] == program
    return words[len(program) :]


def test_training_command_and_config(tmp_path):
    arguments = arguments_of(STEPS[0], ['python', 'tools/train.py'])
    # Only `tools/train.py` has this option.
    arguments.remove('--auto-scale-lr')
    args = runner_parser('').parse_args(arguments)
    assert args.config == 'my_data.py' and 'my_data.py' in STEPS[0]['text']
    config = STEPS[0]['config'].replace("'configs/", f"'{ROOT.as_posix()}/configs/")
    (tmp_path / 'my_data.py').write_text(config)
    cfg = Config.fromfile(tmp_path / 'my_data.py')
    cfg.merge_from_dict(args.cfg_options)
    assert cfg.model.backbone.init_cfg is None
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val'), (cfg.test_dataloader, 'val')):
        dataset = loader.dataset
        assert (dataset.type, dataset.data_root, dataset.ann_file) == ('CocoDataset', 'data/my_data/', f'{split}.json')
        assert dataset.data_prefix.img == f'{split}/' and dataset.metainfo.classes == ('cat', 'dog')
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'data/my_data/val.json'
    without_pretrained(cfg.model)
    model = build_model(cfg)
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 2


def test_converter_command():
    arguments = arguments_of(STEPS[1], ['python', 'tools/convert_checkpoint.py'])
    command = [sys.executable, str(ROOT / 'tools/convert_checkpoint.py'), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    # Only the file is missing.
    assert done.returncode == 2 and 'DOWNLOADED.pth' in done.stderr and 'unrecognized' not in done.stderr
    weights = Config.fromfile(ROOT / 'configs/coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py').model.backbone.init_cfg
    assert weights.checkpoint == arguments[1]


def test_benchmark_command():
    args = build_parser().parse_args(arguments_of(STEPS[2], ['python', '-m', 'benchmarks']))
    assert [parse_target(text).name for text in args.targets] == ['soft-tiny']
    assert args.sizes == [(512, 512), (800, 1344)]


def test_documents_that_the_page_names_exist(tmp_path):
    named = re.findall(r'\b(?:docs|configs|tools)/[\w./-]+\.(?:md|py)', write(tmp_path).text)
    assert len(set(named)) >= 5 and all((ROOT / name).is_file() for name in named)


MINIATURE = """
from projects.photo_digits import demo

train_task = demo.train_task


def brief(task, work_dir, data, console, options, pretrained):
    options = dict(options, **{options})
    if task is demo.DETECTION:
        # After two iterations all scores are low. Without detections there would be no metrics.
        options['model.test_cfg.rcnn.score_thr'] = 0.0
    return train_task(task, work_dir, data, console, options, pretrained)


demo.train_task = brief
demo.NUM_VAL = dict(num_crops=6, num_scenes=9)
demo._export = lambda *arguments: None
if __name__ == '__main__':
    demo.run_demo('demo')
"""


@pytest.mark.long
def test_page_of_a_miniature_demo(tmp_path, environment):
    """Real trainings of two iterations, and the pictures of their models."""
    options = dict(option.split('=') for option in [*OPTIONS, 'default_hooks.logger.interval=1'])
    (tmp_path / 'miniature.py').write_text(MINIATURE.replace('{options}', repr(options)))
    done = subprocess.run(
        [sys.executable, 'miniature.py'], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    file = tmp_path / 'demo/report.html'
    page = Page(file.read_text(encoding='utf-8'))
    assert file.stat().st_size < 4e6 and 'missing' not in str(page.elements)
    assert len(page.all('polyline')) == 3 and 'Loss per iteration' in page.section('losses').text
    for name in ('detection', 'segmentation'):
        images = page.section(name).all('img')
        assert len({image['src'] for image in images}) == 8
        assert all(re.search(r'Digits: \d.*\. Found: .+\.', image['alt']) for image in images)
        assert {(image['width'], image['height']) for image in images} == {('384', '192')}
    (rows,) = page.section('attention').all('img')
    assert int(rows['width']) > 1000 and 'the 5x5 tokens in the dashed square' in page.section('attention').text
