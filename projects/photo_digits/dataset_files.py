"""Export of photo-digits to files, for the data set classes of the toolboxes."""

import json
import math
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from projects.common.manifest import read_manifest
from soft_mm.ops.checks import check_integer
from soft_mm.utils import write_json

from .generators import CropGenerator, SceneGenerator
from .mm_datasets import encode_mask
from .sources import CLASSES, PALETTE, PHOTOGRAPHS, SPLITS

MANIFEST = 'photo_digits.json'
_NAME = 'photo-digits'
_SHEET_SCENES, _SHEET_CROPS = (3, 4), (3, 16)
_SHEET_SIDE = 256


def export_photo_digits(
    out,
    splits=SPLITS,
    num_crops=1000,
    num_scenes=200,
    seed=0,
    crop_options=None,
    scene_options=None,
):
    """Write photo-digits to a folder.

    Each split has these files:

    - ``{split}/crops/<class>/<index>.png``
    - ``{split}/scenes/images/<index>.png``
    - ``{split}/scenes/semantic/<index>.png``: uint8, 0 for background and class + 1 for digits
    - ``annotations/instances_{split}.json``: COCO, with run-length coded masks
    - ``contact_sheet_{split}.png``

    The manifest ``photo_digits.json`` holds the options and the licences of the photographs. The decoded images are
    identical to those of the generators.

    A complete folder with the same options is left unchanged. If the folder has other options, or an earlier call was
    interrupted, the files of the earlier call are removed first. All other files in the folder are kept.

    Args:
        out (str | Path): Folder to write. It is created if it is missing.
        splits (Sequence[str]): Splits to write. Defaults to both.
        num_crops (int): Number of crops per split. Defaults to 1000.
        num_scenes (int): Number of scenes per split. Defaults to 200.
        seed (int): Seed of the generators. Defaults to 0.
        crop_options (dict, optional): Further options of :class:`CropGenerator`.
        scene_options (dict, optional): Further options of :class:`SceneGenerator`.

    Returns:
        bool: True if the folder was written, False if it was already complete.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder with files but without a manifest of this data set. Nothing
            is changed in this case.
        ImportError: If scikit-learn, scikit-image or pycocotools is not installed.
        OSError: If a file cannot be written.
        TypeError: If an option is unknown.
        ValueError: If an option has an invalid value.
    """
    out = Path(out)
    if not splits or len(set(splits)) != len(splits):
        raise ValueError(f'splits={splits!r}: expected one or more of {SPLITS}, each at most once')
    generators = {}
    for split in splits:
        for name, kind, number, options in (
            ('num_crops', CropGenerator, num_crops, crop_options),
            ('num_scenes', SceneGenerator, num_scenes, scene_options),
        ):
            check_integer(name, number)
            generator = kind(split, seed, length=number, **(options or {}))
            generators[split, generator.kind] = generator

    manifest = _make_manifest(generators)
    existing = read_manifest(out / MANIFEST, _NAME)
    if existing == dict(manifest, complete=True):
        return False
    if existing is not None:
        # The manifest must not claim a complete folder if this call is interrupted while it removes files.
        write_json(out / MANIFEST, dict(existing, complete=False))
        _remove_files(out, existing['options'])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, manifest)
    for split in splits:
        crops = _write_crops(out / split / 'crops', generators[split, 'crop'])
        scenes = _write_scenes(out, generators[split, 'scene'])
        _write_image(out / f'contact_sheet_{split}.png', _draw_sheet(scenes, crops))
    write_json(out / MANIFEST, dict(manifest, complete=True))
    return True


def _make_manifest(generators):
    options = {}
    for (split, kind), generator in generators.items():
        options.setdefault(split, {})[kind] = generator.options
    manifest = dict(
        name=_NAME,
        complete=False,
        options=options,
        classes=CLASSES,
        versions=dict(
            numpy=np.__version__,
            opencv=cv2.__version__,
            **{name: version(name) for name in ('scikit-image', 'scikit-learn')},
        ),
        digits='Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine '
        'Learning Repository, as in scikit-learn',
        photographs=[
            dict(
                name=photograph.name,
                split=photograph.split,
                source=photograph.package,
                licence=photograph.licence,
                credit=photograph.credit,
            )
            for photograph in PHOTOGRAPHS
            if photograph.split in options
        ],
    )
    return json.loads(json.dumps(manifest))  # turns tuples into lists, to compare with a manifest read from a file


def _remove_files(out, options):
    # The manifest may have been changed: no name in it may lead outside the folder.
    for split, kinds in ((split, options[split]) for split in SPLITS if split in options):
        for index in range(kinds['crop']['length']):
            for name in CLASSES:
                (out / split / 'crops' / name / _file_name(index)).unlink(missing_ok=True)
        for index in range(kinds['scene']['length']):
            for folder in ('images', 'semantic'):
                (out / split / 'scenes' / folder / _file_name(index)).unlink(missing_ok=True)
        (out / 'annotations' / f'instances_{split}.json').unlink(missing_ok=True)
        (out / f'contact_sheet_{split}.png').unlink(missing_ok=True)
        folders = [out / split / 'crops' / name for name in CLASSES]
        folders += [out / split / 'crops', out / split / 'scenes' / 'images']
        folders += [out / split / 'scenes' / 'semantic', out / split / 'scenes', out / split]
        for folder in [*folders, out / 'annotations']:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _write_crops(folder, generator):
    """Write crops to one folder per class. Return the first crops with their labels, for the contact sheet."""
    first = []
    for name in CLASSES:  # also for classes without crops, because readers number the classes by their folders
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in track(range(generator.length), f'{generator.split} crops'):
        image, label = generator.generate(index)
        _write_image(folder / CLASSES[label] / _file_name(index), image)
        if index < math.prod(_SHEET_CROPS):
            first.append((image, label))
    return first


def _write_scenes(out, generator):
    """Write scenes with their annotations. Return the first scenes, for the contact sheet."""
    split, first = generator.split, []
    folder = out / split / 'scenes'
    for path in (folder / 'images', folder / 'semantic', out / 'annotations'):
        path.mkdir(parents=True, exist_ok=True)
    height, width = generator.size
    images, annotations = [], []
    for index in track(range(generator.length), f'{split} scenes'):
        scene = generator.generate(index)
        _write_image(folder / 'images' / _file_name(index), scene.image)
        _write_image(folder / 'semantic' / _file_name(index), scene.semantic)
        images.append(dict(id=index, file_name=_file_name(index), height=height, width=width))
        for label, box, area, mask in zip(scene.labels, scene.boxes, scene.areas, scene.masks, strict=True):
            annotations.append(
                dict(
                    id=len(annotations) + 1,  # COCOeval reads the id 0 as "no match"
                    image_id=index,
                    category_id=int(label) + 1,
                    bbox=[*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    area=int(area),
                    iscrowd=0,
                    segmentation=encode_mask(mask),
                )
            )
        if index < math.prod(_SHEET_SCENES):
            first.append(scene)
    categories = [dict(id=number + 1, name=name, supercategory='digit') for number, name in enumerate(CLASSES)]
    content = dict(
        info=dict(description=f'photo-digits, {split}'),
        images=images,
        annotations=annotations,
        categories=categories,
    )
    write_json(out / 'annotations' / f'instances_{split}.json', content, indent=None)
    return first


def _draw_sheet(scenes, crops):
    """Draw the contact sheet: scenes with their annotations above crops with their classes."""
    sheets = [
        _draw_grid([_draw_scene(scene) for scene in scenes], _SHEET_SCENES),
        _draw_grid([_draw_crop(image, label) for image, label in crops], _SHEET_CROPS),
    ]
    width = max(sheet.shape[1] for sheet in sheets)
    return np.vstack([np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0))) for s in sheets])


def _draw_grid(tiles, shape):
    rows, columns = shape
    tiles = tiles + [np.zeros_like(tiles[0])] * (rows * columns - len(tiles))
    return np.vstack([np.hstack(tiles[row * columns :][:columns]) for row in range(rows)])


def _draw_scene(scene):
    scale = _SHEET_SIDE / scene.image.shape[1]
    colours = np.array([(0, 0, 0), *PALETTE], np.float32)[:, ::-1]
    digits = (scene.semantic > 0)[..., None]
    image = np.where(digits, 0.4 * scene.image + 0.6 * colours[scene.semantic], scene.image)
    image = cv2.resize(image.astype(np.uint8), None, fx=scale, fy=scale)
    for label, box in zip(scene.labels, np.rint(scene.boxes * scale).astype(int), strict=True):
        colour = PALETTE[label][::-1]
        cv2.rectangle(image, box[:2].tolist(), (box[2:] - 1).tolist(), colour, 1)
        _draw_text(image, CLASSES[label], (int(box[0]) + 2, int(box[1]) + 12), colour)
    return image


def _draw_crop(image, label):
    side = _SHEET_SIDE * _SHEET_SCENES[1] // _SHEET_CROPS[1]
    image = cv2.resize(image, (side, round(side * image.shape[0] / image.shape[1])))
    image = np.pad(image, ((16, 0), (0, 0), (0, 0)))
    _draw_text(image, CLASSES[label], (2, 12), PALETTE[label][::-1])
    return image


def _draw_text(image, text, position, colour):
    for shade, thickness in (((0, 0, 0), 3), (colour, 1)):
        cv2.putText(image, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.45, shade, thickness)


def _file_name(index):
    return f'{index:06d}.png'


def _write_image(path, image):
    if not cv2.imwrite(str(path), image):
        raise OSError(f'cannot write {path}: check the permissions of the folder and the free disk space')
