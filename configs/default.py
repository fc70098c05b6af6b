"""Every field of a config, with its unit and default.

The other configs start from `get_config()` and override. A stage is a plain
dict: what it leaves out comes from `stage_defaults`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns a config without stages: all fields, all defaults."""
  config = config_dict.ConfigDict()

  # Where raw datasets lie, as their sources ship them; prepared ones go to
  # data_dir/prepared.
  config.data_dir = 'data'
  # Decides initial weights, the order of examples and every augmentation.
  config.seed = 0

  # resnet10, resnet18, resnet34, resnet50, resnet101 or resnet152.
  config.model = 'resnet50'
  # Channels of the first block group; the published networks have 64.
  config.num_filters = 64
  # Side of the first convolution, in pixels: 7 as published, 3 for small
  # images. It is the same in all stages, or weights would not fit.
  config.stem_kernel = 7
  # Blur before subsampling (Zhang 2019, arXiv:1904.11486): BlurPool.
  config.blur_pool = False
  # Which images of a training batch BatchNorm normalises together: 'global',
  # all of them; 'per_device', those of each device; 'groups:K', those of K
  # neighbouring devices. Running statistics are the mean over the groups.
  config.batch_norm = 'global'
  # 'blocks': the backward pass computes each residual block again instead of
  # keeping what it held: less memory, a third more FLOPs. 'none': it keeps all.
  config.remat = 'none'

  # Images are normalised with these, in [0, 1], red, green, blue: ImageNet's.
  # One value for all stages, because the backbone has to get used to it.
  config.mean_rgb = (0.485, 0.456, 0.406)
  config.std_rgb = (0.229, 0.224, 0.225)

  # 'bfloat16', 'float32', or 'auto': bfloat16 on TPU and GPU, float32 on CPU,
  # where bfloat16 is emulated. Stages without mixed_precision use float32.
  config.dtype = 'auto'
  # 'tpu', 'gpu' or 'cpu' refuse to run on anything else; 'any' takes what
  # there is.
  config.platform = 'any'

  # A step's new state takes the memory of the old one; False keeps both, for
  # looking at what a step changed.
  config.donate_state = True

  # Where compiled steps are kept for the next start, readable by their owner
  # alone, because whoever can write there can run code; '': nowhere.
  config.compilation_cache_dir = '~/.cache/jaxprog/xla'

  # XLA's flags: 'none'; 'overlap' sums gradients while others are computed;
  # 'deterministic' gives the same bits in every run on GPUs. Flags that the
  # environment sets win.
  config.xla_flags = 'none'

  # Workers that decode images in each process; 0: one a core.
  config.num_workers = 0
  # 'thread', 'process', or 'auto': threads up to 16 workers (2 of raw images),
  # then processes, because Python runs in one thread at a time.
  config.worker_kind = 'auto'
  # Train on no image that some stage evaluates on, nor on any of ILSVRC's
  # validation images.
  config.exclude_leaks = False
  # Images that cannot be decoded are left out of the loss and named; more than
  # so many in one stage end the run.
  config.max_bad_images = 10
  # Besides the end of every epoch, save every so many steps (0: never) and
  # every so many minutes (0: never).
  config.checkpoint_every_steps = 0
  config.checkpoint_every_minutes = 10.0
  # So many steps in a row whose loss or gradient is not finite (they change
  # nothing) take the stage back to its last checkpoint, with another order of
  # examples; at most twice, then the run ends. 0: they never do.
  config.max_skipped_steps = 10
  # Without a step, an evaluated batch or a save for so long, a run prints what
  # all its threads are doing and ends; 0: never.
  config.watchdog_minutes = 30.0
  # Write WORKDIR/tensorboard; without, TensorFlow is not even imported.
  config.tensorboard = True
  # Steps between two points of a training curve in TensorBoard.
  config.log_every_steps = 20
  # Steps of each stage, after the first 10, that jax.profiler traces for
  # TensorBoard's profile page.
  config.profile_steps = 0

  # --mode=check: steps of each stage that are timed, after one more; 0: none is
  # compiled.
  config.check_steps = 3

  # --mode=plan: the part of a chip's published rates that a step reaches
  # (assumed: a TPU v3's published 1,875-2,020 images/s of ResNet-50 are 0.67 to
  # 0.72 of what its memory allows).
  config.plan_utilization = 0.7
  # What a chip costs an hour, in your currency; 0: unknown.
  config.chip_hour_price = 0.0
  # Training images a second that a core of the hosts makes ready; 0: as
  # measured for the stage's storage (docs/data.md).
  config.images_per_core = 0.0

  # --mode=lr_find: so many steps, each at a higher rate.
  config.lr_find_steps = 100
  config.lr_find_min = 1e-6
  config.lr_find_max = 10.0

  config.stage_defaults = stage_defaults()
  config.stages = []
  return config


def stage_defaults() -> config_dict.ConfigDict:
  """Returns the fields of one stage."""
  stage = config_dict.ConfigDict()

  # Names a directory of the run: letters, digits, '_', '-' and '.'.
  stage.name = ''
  # One sentence for the report.
  stage.description = ''

  # digits, imagenette, tiny_imagenet, imagenet_mini, imagenet2012,
  # tfds:NAME or folder:PATH.
  stage.dataset = ''
  # Checked against the dataset; 0: whatever it has.
  stage.num_classes = 0
  # Use only these classes, by WordNet id or name; (): all of them.
  stage.classes = ()

  # Weights to start from in place of those of the stage before (''): a
  # .safetensors file of config.model under torchvision's or timm's names.
  stage.init_from = ''

  # What happens to the weights of the stage before: 'plain', they are carried
  # as they are; 'shrink_and_perturb' (arXiv:1910.08475); 'dash'
  # (arXiv:2410.23495); 'none', the stage starts afresh.
  stage.transfer = 'plain'
  # shrink_and_perturb: carried weights are multiplied with shrink, and perturb
  # times a fresh initialisation is added.
  stage.shrink = 0.5
  stage.perturb = 0.2
  # dash: the smallest factor.
  stage.dash_least = 0.3
  # Residual blocks at the end of the network that start afresh.
  stage.reset_blocks = 0
  # Which weights: 'best', 'final' or 'ema'.
  stage.transfer_weights = 'best'
  # 'auto': the head is kept where the classes are the same, else fresh; or
  # 'fresh', 'zero'; 'by_class': the row of each class comes from the nearest
  # earlier stage that knew it.
  stage.transfer_head = 'auto'
  # BatchNorm's statistics: 'carry', 'reset', or 'recalibrate' on training
  # images.
  stage.transfer_statistics = 'carry'
  # Training batches that dash and recalibrate look at.
  stage.transfer_batches = 10

  # How training images are kept: 'original', as they came; 'jpeg:N' with the
  # shorter side at most N pixels, quality 90 ('jpeg:N:QUALITY'); 'raw' or
  # 'raw:N', decoded, three bytes a pixel.
  stage.storage = 'original'

  # Side of the square the network sees, in pixels.
  stage.image_size = 224
  # Random resized crop: smallest part of the image's area and largest
  # width-to-height ratio (its inverse is the smallest).
  stage.min_crop_area = 0.08
  stage.max_crop_aspect = 4 / 3
  # Mirror half of the training images, left to right.
  stage.flip = True
  # Mirror an image every other epoch instead of by chance.
  stage.alternating_flip = False
  # Random colours: each factor is uniform in [1 - x, 1 + x], the shift of the
  # hue in [-x, x] turns; in random order, as torchvision's ColorJitter.
  stage.brightness = 0.0
  stage.contrast = 0.0
  stage.saturation = 0.0
  stage.hue = 0.0
  # 'none', 'rand_augment' (arXiv:1909.13719) or 'trivial_augment'
  # (arXiv:2103.10158).
  stage.auto_augment = 'none'
  # rand_augment: operations one after the other, and their strength of 0..30.
  stage.rand_augment_layers = 2
  stage.rand_augment_magnitude = 9
  # Chance to fill a random rectangle with noise, and its part of the area
  # (Zhong et al. 2017, arXiv:1708.04896).
  stage.erasing_probability = 0.0
  stage.erasing_min_area = 0.02
  stage.erasing_max_area = 1 / 3
  # Beta distribution that mixes two images or pastes a rectangle of one into
  # the other, 0: not; where both are set, each step takes one of them
  # (arXiv:1710.09412, arXiv:1905.04899).
  stage.mixup_alpha = 0.0
  stage.cutmix_alpha = 0.0

  # What decides which weights are best: 'validation', or 'holdout:2%' of the
  # training images; then the validation images are looked at once, at the end.
  stage.eval_split = 'validation'
  # Side of evaluation images; 0: the largest the stage trains on.
  stage.eval_image_size = 0
  # Evaluation resizes the shorter side to eval_image_size / eval_crop and
  # takes the centre.
  stage.eval_crop = 0.875
  # 'bilinear' or 'bicubic'.
  stage.eval_interpolation = 'bilinear'

  # Passes over the training images; fractions are allowed.
  stage.num_epochs = 1.0
  # Images in one step, over all devices of all processes.
  stage.batch_size = 128

  # Images whose gradients are computed at once, on all devices; those of a
  # whole batch are averaged before the update. 0: the whole batch.
  stage.micro_batch_size = 0
  # What changes within the stage, such as ({'from_epoch': 10, 'image_size':
  # 192, 'mixup_alpha': 0.2},), in order of from_epoch (whole, from 1 on,
  # counted from 0): batch_size, image_size, or how images are augmented.
  stage.phases = ()

  # Peak of the schedule, per step.
  stage.learning_rate = 0.001
  # SGD, LARS: multiply learning_rate by batch_size / base_batch_size.
  stage.scale_learning_rate = False
  stage.base_batch_size = 256
  # adamw, adamw_8bit, lamb, lars, muon, rmsprop, sgd_momentum or
  # sgd_momentum_8bit.
  stage.optimizer = 'adamw'
  # constant, cosine, cosine_warmup, exponential_warmup, linear, one_cycle,
  # plateau, polynomial or step.
  stage.schedule = 'cosine_warmup'
  # Linear rise from 0 to the peak, in epochs or else in optimizer steps;
  # one_cycle has warmup_fraction.
  stage.warmup_epochs = 0.0
  stage.warmup_steps = 0
  # one_cycle: the part of the steps that rises, the peak over the first rate,
  # and the first rate over the last.
  stage.warmup_fraction = 0.3
  stage.div_factor = 25.0
  stage.final_div_factor = 1e4
  # polynomial: the exponent.
  stage.power = 2.0
  # Last rate as a part of the peak, or the least one: cosine, polynomial,
  # exponential_warmup, linear, plateau.
  stage.end_factor = 0.0
  # cosine, cosine_warmup: epochs from the peak to the first warm restart (0:
  # none), and each period over the one before.
  stage.restart_epochs = 0.0
  stage.restart_factor = 1.0
  # step: epochs at which the rate is multiplied by step_factor.
  stage.milestones = ()
  stage.step_factor = 0.1
  # plateau: the rate is multiplied by plateau_factor when val_loss or val_top1
  # has not improved by plateau_min_delta for more than plateau_patience
  # evaluations; then plateau_cooldown evaluations do not count.
  stage.plateau_metric = 'val_loss'
  stage.plateau_factor = 0.1
  stage.plateau_patience = 3
  stage.plateau_min_delta = 0.0
  stage.plateau_cooldown = 0

  # AdamW, LAMB: decay rates of both moments, and what keeps the division
  # finite (RMSprop too). Muon uses them for all but kernels.
  stage.b1 = 0.9
  stage.b2 = 0.999
  stage.eps = 1e-8
  # SGD, LARS, Muon, RMSprop.
  stage.momentum = 0.9
  # SGD, LARS, Muon.
  stage.nesterov = False
  # Momentum, or Adam's first moment (AdamW, LAMB, Muon): 'float32', or
  # 'bfloat16' for half the bytes. Second moments stay float32.
  stage.optimizer_state_dtype = 'float32'
  # RMSprop: decay rate of the mean square; PyTorch's alpha.
  stage.rms_decay = 0.99
  # LARS: a layer's rate is this times its weights' norm over its gradient's.
  stage.trust_coefficient = 0.001
  # 8-bit: numbers that share a scale, and the size of the smallest array that
  # is quantised.
  stage.quantization_block = 256
  stage.quantization_min_size = 4096
  # On kernels only. 'decoupled': each step takes learning_rate * weight_decay
  # of a kernel. 'coupled': it is part of the gradient. 'auto': decoupled for
  # AdamW, LAMB and Muon, coupled for SGD, LARS and RMSprop, as in PyTorch.
  stage.weight_decay = 1e-4
  stage.weight_decay_kind = 'auto'
  # Largest global norm of a step's gradient; 0: no limit.
  stage.gradient_clipping = 0.0
  # Or largest norm of a unit's gradient over that of its weights (Brock et al.
  # 2021, arXiv:2102.06171); 0: no limit.
  stage.adaptive_clipping = 0.0
  # Keep an exponential moving average of the weights, evaluated beside them;
  # how much of it stays each step, 0: none.
  stage.ema_decay = 0.0

  # Train only the head in the first epochs.
  stage.freeze_epochs = 0.0
  # Rates of the head and of the backbone over the schedule's.
  stage.head_rate_factor = 1.0
  stage.backbone_rate_factor = 1.0
  # Rate of each block of layers over that of the one after it.
  stage.layer_decay = 1.0

  # Stop the stage once val_top1 is this high; 0: never.
  stage.target_top1 = 0.0
  # Stop when val_top1 has not improved by early_stopping_min_delta for so many
  # evaluations; 0: never.
  stage.early_stopping_patience = 0
  stage.early_stopping_min_delta = 0.0

  # Part of the target spread evenly over all classes, in training only.
  stage.label_smoothing = 0.0
  # Compute in config.dtype; False: float32 throughout.
  stage.mixed_precision = True
  return stage
