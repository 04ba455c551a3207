"""Class names, colours, label values and sizes of data sets, as plain values, so that configs and sources share them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Submission:
  """How predictions are written for a benchmark's server.

  Attributes:
    folder: of the files, inside the archive.
    suffix: what a file's name has behind the image's name.
    ids: the number that stands for each class; empty: the class id itself.
    indexed: whether the files are palette PNGs.
    archive: "tgz" or "zip".
  """

  folder: str = "results"
  suffix: str = ".png"
  ids: tuple[int, ...] = ()
  indexed: bool = True
  archive: str = "zip"


PLAIN_SUBMISSION = Submission()  # For data sets without a server.


# CamVid, 11 classes as SegNet used them (Badrinarayanan et al. 2017); 367 train, 101 val, 233 test images, 360x480.
# Fields of config.data for the `folder` source, SegNet's layout.
CAMVID = dict(
  images="{split}",
  masks="{split}annot",
  classes=tuple("Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()),
  colors=tuple("808080 800000 C0C080 804080 3C28DE 808000 C08080 404080 400080 404000 0080C0".split()),
  label_map="11:255",
)

# PASCAL VOC 2012 segmentation (Everingham et al. 2015; host.robots.ox.ac.uk/pascal/VOC/voc2012), with the extra labels of
# SBD (Hariharan et al. 2011). The masks are palette PNGs of these numbers, 255 = void. Images are 500x500 at most.
VOC_CLASSES = tuple(
  (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
    " pottedplant sheep sofa train tvmonitor"
  ).split()
)
VOC_COUNTS = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582, "test": 1456}
VOC_CANVAS = (513, 513)  # What official DeepLab pads to, in training and evaluation.


# comp6 is the competition with training data beside VOC's own, which SBD and ImageNet weights are.
def voc_submission(split: str) -> Submission:
  """Of the VOC evaluation server."""
  return Submission(folder=f"results/VOC2012/Segmentation/comp6_{split}_cls", archive="tgz")


SBD_COUNT = 11355  # Images of SBD, its own train and val together; its split is not used.
NUCLEI_COUNT = 670  # Images of stage1_train of the 2018 Data Science Bowl.

# Cityscapes (Cordts et al. 2016): (name, id in _labelIds.png, RRGGBB) of the 19 classes, in the order of their train ids.
# All other ids up to 33 are void.
CITYSCAPES = (
  ("road", 7, "804080"),
  ("sidewalk", 8, "F423E8"),
  ("building", 11, "464646"),
  ("wall", 12, "66669C"),
  ("fence", 13, "BE9999"),
  ("pole", 17, "999999"),
  ("traffic light", 19, "FAAA1E"),
  ("traffic sign", 20, "DCDC00"),
  ("vegetation", 21, "6B8E23"),
  ("terrain", 22, "98FB98"),
  ("sky", 23, "4682B4"),
  ("person", 24, "DC143C"),
  ("rider", 25, "FF0000"),
  ("car", 26, "00008E"),
  ("truck", 27, "000046"),
  ("bus", 28, "003C64"),
  ("train", 31, "005064"),
  ("motorcycle", 32, "0000E6"),
  ("bicycle", 33, "770B20"),
)
CITYSCAPES_NUM_IDS = 34
# The server and cityscapesscripts find a prediction by its image's name, city_sequence_frame, and want label ids.
CITYSCAPES_SUBMISSION = Submission(
  suffix="_labelIds.png", ids=tuple(label_id for _, label_id, _ in CITYSCAPES), indexed=False
)
CITYSCAPES_COUNTS = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
CITYSCAPES_CITIES = {  # {split: names between spaces}
  "train": "aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld monchengladbach"
  " strasbourg stuttgart tubingen ulm weimar zurich",
  "val": "frankfurt lindau munster",
  "test": "berlin bielefeld bonn leverkusen mainz munich",
  "train_extra": "augsburg bad-honnef bamberg bayreuth dortmund dresden duisburg erlangen freiburg heidelberg heilbronn"
  " karlsruhe konigswinter konstanz mannheim muhlheim-ruhr nuremberg oberhausen saarbrucken schweinfurt troisdorf"
  " wuppertal wurzburg",
}
CITYSCAPES_CANVAS = (1025, 2049)  # What official DeepLab pads the 1024x2048 images to: k * output stride + 1.

# KITTI road (Fritsch et al. 2013; cvlibs.net/datasets/kitti/eval_road.php): RGB masks. Images by category (urban marked,
# urban multiple marked lanes, urban unmarked), in training and testing; 370 to 376 x 1224 to 1242 pixels.
KITTI_ROAD_COUNTS = {"um": (95, 96), "umm": (96, 94), "uu": (98, 100)}
# Black is other road or "don't care": the devkit (helper.py, getGroundTruth) takes only pixels with red as valid.
KITTI_ROAD_MASK_COLORS = {"FF0000": 0, "FF00FF": 1, "000000": 255}
KITTI_ROAD_COLORS = ("000000", "00FF00")  # Of pictures: road is painted green.

# The following are fields of config.data for the `folder` source.

# Carvana Image Masking Challenge (kaggle.com/c/carvana-image-masking-challenge): 318 cars from 16 angles each, CAR_01.jpg
# to CAR_16.jpg, 1280x1918. The GIFs of the masks hold 0 and 1; PNGs made from them, as many tutorials want them, 255.
CARVANA = dict(
  images="train",
  masks="train_masks",
  mask_suffix="_mask",
  group="^[^_]+",  # The car.
  classes=("background", "car"),
  label_map="255:1",
)

# TGS Salt Identification Challenge (kaggle.com/c/tgs-salt-identification-challenge): 4000 seismic images of 101x101 in
# train.zip; the PNGs of the masks have 16 bits, 65535 being salt, or 8 where they were saved again. 39 % hold no salt.
SALT = dict(images="images", masks="masks", classes=("sediment", "salt"), label_map="65535:1,255:1")

# 97 photographs of chairs, and masks of two colours (RGB, or grey 0 and 255).
CHAIRS = dict(
  images="images", masks="masks", classes=("background", "chair"), colors=("000000", "FFFFFF"), label_map="255:1"
)

# (H, W) that holds every image of a source, known without reading it.
LARGEST = {"voc": (500, 500), "cityscapes": (1024, 2048), "kitti_road": (376, 1242)}

VOID_COLOR = (224, 224, 192)  # The cream that PASCAL VOC draws void in.


def palette(num_classes: int) -> np.ndarray:
  """The PASCAL VOC colour map, [num_classes, 3] uint8: the bits of an id spread over red, green and blue."""
  ids = np.arange(num_classes)
  colors = np.zeros((num_classes, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      colors[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return colors


def parse_colors(colors) -> np.ndarray:
  """("FF0000", "#00FF00") -> [N, 3] uint8.

  Raises:
    ValueError: naming the item that is not six hexadecimal digits.
  """
  rows = []
  for color in colors:
    digits = str(color).lstrip("#")
    if len(digits) != 6 or any(c not in "0123456789abcdefABCDEF" for c in digits):
      raise ValueError(f"{color!r} is not a colour: give six hexadecimal digits, e.g. 804080.")
    rows.append([int(digits[i : i + 2], 16) for i in (0, 2, 4)])
  return np.array(rows, np.uint8).reshape(-1, 3)
