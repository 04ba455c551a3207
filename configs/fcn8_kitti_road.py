"""FCN-8s that finds the road to drive on: KITTI road in the form of the widespread tutorial.

python -m segjax.main --config=configs/fcn8_kitti_road.py --config.data.dir=data_road --config.init.path=vgg16.pth --workdir=runs/fcn8_kitti_road

Data:      data_road.zip as unzipped: training/image_2/um_000000.png (um, umm, uu; 289 images of about 375x1242) and
           training/gt_image_2/um_road_000000.png; um_lane_* are another task, and left alone. Red is background, magenta
           road; black, other road or don't care, is void, since the devkit leaves out what has no red (helper.py,
           getGroundTruth); the tutorial takes all for road that is not red. Road is painted green.
Split:     none is official: a fifth of the training images is held out (--config.data.fold=1 to 4 for others). Frames of
           one drive fall on both sides, which flatters the score. The test images have no public labels;
           --mode=submit --config.data.eval_split=test writes predictions.
Size:      the tutorial squeezes whole images to 160x576; here crops of that size come from images at 0.475 to 0.6, and
           evaluation shows whole images at half size, scored at their own.
Weights:   torchvision's ImageNet VGG-16, vgg16-397923af.pth, as vgg16.pth above.
Recipe:    the "semantic segmentation" project of Udacity's self-driving car course (github.com/udacity/
           CarND-Semantic-Segmentation): 1x1 on layer 7, sums at the widths of pool4 and pool3, Adam, keep probability 0.5.
           It leaves rate, batch and epochs to its readers, who take 1e-4 to 1e-3, 8 or so, and 20 to 60.
Hardware:  one GPU of 8 GB. Hours: not measured.
Published: the benchmark's MaxF is of bird's-eye views, so not comparable. Ours: not run on all images.
Lanes:     --config.data.labels=lane takes the masks of the lane that the car is on, which the 95 images um_* have; then
           also --config.augment.flip=False, for a mirrored car drives on the left. Run on 11 of these, from scratch, as a
           demonstration: lane IoU 0.862 at the last of 300 steps (0.868 at step 200), on 3 images held out of 11 (fold 0
           of 4; of the same few drives as the other 8; seed 0, one run; with flips 0.763) with --config.data.folds=4
           --config.model.width=8 --config.optimizer.base_lr=1e-3 --config.batch_size=2 --config.num_steps=300
           --config.eval_every=100 --config.checkpoint_every=100 --config.eval.batch_size=3 --config.data.loader=grain; 13
           minutes on two CPU cores that five other jobs used too.
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="fcn", data="kitti_road")
  config.num_steps = 1160  # 40 epochs of 231 images.
  config.batch_size = 8
  config.crop_size = (160, 576)  # The tutorial's size.
  config.eval_every = 145
  config.checkpoint_every = 145
  config.model.fuse = "features"  # The tutorial's.
  config.model.dropout = 0.5  # The tutorial's keep probability.
  config.data.folds = 5  # 58 images in val.
  config.augment.scale = (0.475, 0.6)  # The smallest images, 370x1224, are then 175x581 or more.
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-4
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 0.0  # Plain Adam.
  config.policy.metric = "foreground_iou"
  config.eval.scales = (0.5,)
  config.init.scheme = "torchvision"
  config.init.exclude = ("score_fc7", "upscore_fc7", "upscore_pool4", "upscore", "logits")
  return config
