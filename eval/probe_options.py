"""How a probe is trained, as the flags of train.py and eval/linear_separability.py say."""

from dataclasses import dataclass

from utils.run.command import numbers_in


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe is trained, and on which features of the model."""

    n_epochs: int = 10
    batch_size: int = 8  # windows
    learning_rate: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 2e-8
    n_layers: int = 1
    ctc: bool = False  # phones: recognise their sequence instead of labelling frames
    get_encoded: bool = False  # features: encoded frames instead of contexts
    level: str = "frames"  # of the model that gives them, or "segments"
    n_inner: int = 0  # speakers: dimensions of a bottleneck (0: none)
    unfrozen: bool = False  # train the model as well
    logging_step: int = 1  # epochs between writes of the log
    seed: int = 0
    cpc_epoch: int | None = None  # the epoch of the training run, if the model is of one
    max_stored_bytes: int | None = None  # of features; None: as memory allows
    n_hidden: int = 0  # units of a hidden layer, which there is besides if this isn't 0
    feature_norm: str = "none"  # or "utterance", "speaker": features without its mean and variance
    n_times: int = 1  # classifiers, with other first weights and another order of the windows
    repetition: int = 0  # which of these, from 0
    knn: tuple = ()  # numbers of nearest neighbours to classify by, too

    @classmethod
    def of_training_run(cls, args, task, cpc_epoch):
        """The options set by the --linsep_... flags of train.py."""
        phone = task == "phone"
        return cls(
            n_epochs=args.linsep_n_epoch,
            batch_size=args.linsepBatchSizeGPU,
            learning_rate=args.linsep_lr,
            beta1=args.linsep_beta1,
            beta2=args.linsep_beta2,
            epsilon=args.linsep_epsilon,
            n_layers=args.linsep_net_layers,
            ctc=phone and args.CTCphones,
            get_encoded=phone and args.phone_get_encoded,
            logging_step=args.linsep_task_logging_step,
            seed=args.random_seed,
            cpc_epoch=cpc_epoch,
            **further_options(args),
        )


def further_options(args):
    """The ProbeOptions of flags that train.py and eval/linear_separability.py have in common."""
    return {
        "n_hidden": args.linsep_hidden,
        "feature_norm": args.feature_norm,
        "level": args.level,
        "n_times": args.linsep_times,
        "knn": tuple(numbers_in(args.knn)),
    }
