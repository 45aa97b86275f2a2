"""The command line of main_vit.py: every option, its range and its default."""

import augment_vit
import cache_vit
import report_vit
from config_vit import LEARNING_RATE, Parser, expanded_path, number


def make_parser() -> Parser:
    """The command line; every default is shown here, derived ones are filled in by `resolve`."""
    # fmt: off
    parser = Parser(
        prog="main_vit.py", description="Train a Vision Transformer on a folder of images, by itself or as a trial of an NNI experiment.", allow_abbrev=False,
        epilog="Values come, later over earlier, from: defaults, --config, the command line, NNI.",
    )
    positive, share = number(int, 1), number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--download-dir", type=expanded_path, metavar="DIR", help="folder with train/ and, if there are, val/ and test/, or with class folders directly (default: the digits demo, written to ./dataset/digits)")
    add("--num-classes", type=number(int, 2), metavar="N", help="must be the number of class folders (default: that number)")
    add("-s", "--image-size", type=positive, metavar="PIXELS", help="images are resized to this square (default: 224; demo 16)")
    add("-ch", "--channel", type=number(int, 1), choices=(1, 3), help="1 reads grey, 3 reads RGB (default: 3; demo 1)")
    add("--val-split", type=number(float, 0, 0.9, above=True), metavar="SHARE", help="part of train/ to select on; given, it wins over val/ (default: val/, else 0.1; demo 0.2)")
    add("--flip", choices=tuple(augment_vit.FLIPS), default="none", help="random flips in training (default: %(default)s)")
    add("--affine", type=share, metavar="SHARE", default=0.0, help="random rotation, scale and shift in training; 1 is up to 45 degrees, a factor of 2 and half the side (default: %(default)s)")
    add("--crop", type=number(float, 0, 1, above=True), metavar="SHARE", default=1.0, help="random crops in training, of this smallest share of the area; 1 for none (default: %(default)s)")
    add("--color", type=share, metavar="SHARE", default=0.0, help="random brightness, contrast and saturation in training, factors from 1 - SHARE to 1 + SHARE (default: %(default)s)")
    add("--randaugment", type=number(float, 0, 10), metavar="MAGNITUDE", default=0.0, help="RandAugment in training: two random operations of this magnitude, up to 10; 0 for none (default: %(default)s)")
    add("--erase", type=share, metavar="PROBABILITY", default=0.0, help="of a random rectangle of a training image being erased (default: %(default)s)")
    add("--mixup", type=number(float, 0, 100), metavar="ALPHA", default=0.0, help="blend training images and their targets in pairs, by shares from Beta(ALPHA, ALPHA); 0 for none (default: %(default)s)")
    add("--cutmix", type=number(float, 0, 100), metavar="ALPHA", default=0.0, help="the same by a box of the other image; with --mixup each image takes one of the two (default: %(default)s)")
    add("--skip-broken", action="store_true", help="leave out images that cannot be decoded, instead of ending")
    add("--cache-dir", type=expanded_path, metavar="DIR", help="where decoded images are kept for later runs (default: ~/.cache/vit-nni)")
    add("--cache", choices=cache_vit.MODES, default="disk", help="keep decoded images on disk, for all runs, or in memory, for this one, or decode them in every epoch (default: %(default)s)")
    add("--cache-limit", type=number(float, 0, above=True), metavar="GB", help="most that --cache-dir may hold when images are decoded into it: what was not used for longest makes room (default: what the disk has)")
    add("--workers", type=number(int, 1, 1024), metavar="N", help="threads that decode images (default: the cores that this process may use; with --cache off its share of them)")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", default="vit", help="vit, vit_torchvision (as pretrained_vit.py makes it), or another architecture of vit-pytorch: simple_vit, deepvit, cait, ... (default: %(default)s)")
    add("-p", "--patch-size", type=positive, metavar="PIXELS", help="side of a patch (default: 16; demo 4)")
    add("-pn", "--patch-num", type=positive, metavar="N", help="patches per side: patch size = image size / N")
    add("-vd", "--vt-dim", type=positive, metavar="N", default=256, help="width of the tokens (default: %(default)s)")
    add("-d", "--vt-depth", type=positive, metavar="N", default=6, help="transformer blocks (default: %(default)s)")
    add("-vh", "--vt-heads", type=positive, metavar="N", default=8, help="attention heads (default: %(default)s)")
    add("--dim-head", type=positive, metavar="N", help="width of a head (default: vt-dim / vt-heads, rounded down)")
    add("-mlpd", "--mlp-dim", type=positive, metavar="N", default=512, help="hidden width of the feed-forward (default: %(default)s)")
    add("--pool", choices=("cls", "mean"), help="what the head reads: class token or mean of the patches (default: cls)")
    add("--dropout", type=share, metavar="SHARE", help="in attention and feed-forward (default: 0)")
    add("--emb-dropout", type=share, metavar="SHARE", help="after the position embedding (default: 0)")

    add = parser.add_argument_group("training").add_argument
    add("-e", "--epochs", type=positive, metavar="N", default=20, help="passes over the training images (default: %(default)s)")
    add("--TRIAL-BUDGET", "--stop-epoch", dest="stop_epoch", type=positive, metavar="N", help="end after this one of the --epochs, with their learning rates; Hyperband's TRIAL_BUDGET")
    add("--max-steps", type=positive, metavar="N", help="end after this many optimizer steps, validate and save; an epoch cut short is selected only where there is no whole one")
    add("-b", "--batch-size", type=positive, metavar="N", default=32, help="images per step (default: %(default)s)")
    add("--optimizer", choices=tuple(LEARNING_RATE), default="adamw", help="(default: %(default)s)")
    add("--lr", "--learning-rate", type=number(float, 0, above=True), metavar="RATE", help="peak learning rate (default: 5e-4; sgd 2e-2, rmsprop 2e-4)")
    add("--momentum", type=share, metavar="SHARE", default=0.9, help="of sgd and rmsprop (default: %(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), metavar="RATE", help="on weight matrices only (default: 0.05 for adamw, else 1e-4)")
    add("--label-smoothing", type=share, metavar="SHARE", default=0.0, help="(default: %(default)s)")
    add("--clip-grad", type=number(float, 0), metavar="NORM", default=1.0, help="largest gradient norm, 0 for no limit (default: %(default)s)")
    add("--moving-average-decay", type=share, metavar="SHARE", default=0.0, help="EMA of the weights, then validated and saved instead; 0 for none (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", default=0, help="of everything random (default: %(default)s)")
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="the 16-bit ones are mixed precision; auto takes it where the device gains from it (default: %(default)s)")
    add("--deterministic", action="store_true", help="on a GPU the algorithms that repeat to the bit, where torch has them; may be slower")
    add("--gpu", type=number(int, 0), metavar="N", help="CUDA device (default: the first, under NNI the one with the fewest trials; the CPU where there is none)")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads of the computation (default: the cores that this process may use, under NNI its share of them; OMP_NUM_THREADS, which torchrun sets to 1, limits it)")
    add("--metric", choices=tuple(report_vit.METRICS), default="accuracy", help="of validation: selects the best epoch, is NNI's default metric (default: %(default)s)")

    add = parser.add_argument_group("learning rate schedule").add_argument
    add("--scheduler", choices=("cosine", "step", "constant"), help="(default: step if gamma is given, else cosine)")
    add("-g", "--gamma", type=number(float, 0, 1, above=True), metavar="FACTOR", help="of the step schedule: multiplies the rate after every epoch")
    add("--warmup-epochs", type=number(float, 0), metavar="N", help="of the cosine schedule (default: a tenth of the epochs)")
    add("--dont-adjust-learning-rate", action="store_true", help="the same as --scheduler constant")

    add = parser.add_argument_group("output, resume, NNI").add_argument
    add("--model-dir", type=expanded_path, metavar="DIR", help="output folder, under NNI its own (default: runs/<time>-<seed>)")
    add("--checkpoint-steps", type=positive, metavar="N", help="save every N steps too, not only after an epoch")
    add("--checkpoint-minutes", type=number(float, 0, above=True), metavar="T", help="save every T minutes too")
    add("--auto-resume", action="store_true", help="go on with the run that --model-dir holds, if any; always so under NNI")
    add("--resume", type=expanded_path, metavar="FILE", help="continue the run of this checkpoint.pth.tar, in its folder")
    add("--init-from", type=expanded_path, metavar="FILE", help="start a new run from the weights of this checkpoint")
    add("--load-checkpoint-dir", type=expanded_path, metavar="DIR", help="of PBT: go on from the checkpoint in there, if any, for --epochs more")
    add("--save-checkpoint-dir", type=expanded_path, metavar="DIR", help="of PBT: leave the checkpoint there too, at the end")
    add("--config", type=expanded_path, metavar="FILE", help="YAML of parameters; the args.yaml of a run repeats it")
    add("--request-from-nni", action="store_true", help="take parameters from NNI and report to it")
    add("--check", type=expanded_path, metavar="FILE", help="check an NNI experiment (config.yml) and its search space, and end")
    # fmt: on
    return parser
