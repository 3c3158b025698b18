"""Takes over checkpoints of hCPC, the program of Cuervo et al. (2021, 2022).

It writes the files of the original program with other contents: several corpora in each path flag,
more flags, an optimiser with four groups of parameters, and a level's number in the logs' names.
"""

from utils.misc import UserError
from utils.run.flags import LISTS, build_parser
from utils.run.level_flags import LEARNED

# Flags of hCPC that this program doesn't have -> the value that makes no difference. Those of a
# single call (restartEpochCount) and without any effect (NoARonRegHead) aren't among them.
NEUTRAL = {
    "segmentCompression": "average",
    "targetQuantizer": "none",
    "encodingsQuantizer": "none",
    "contextQuantizer": "none",
    "numGroupsCodebook": 1,
    "sincNet": False,
    "useKreukLoss": False,
    "predictClusterIds": False,
}


def refuse_unsupported(stored, source):
    """Raise UserError if flags in a checkpoint ask for what this program doesn't have.

    stored: a dict; source: the checkpoint's file.
    """
    for name, neutral in NEUTRAL.items():
        value = stored.get(name, neutral)
        if value != neutral:
            raise UserError(
                f"{source}: was trained with --{name} {value}, which this program doesn't support"
            )


def take_over(state):
    """Give the state of a checkpoint, read from a file of hCPC, the form of the original's.

    States that have it already stay as they are. Dropped is the baseline of REINFORCE, which every
    criterion of hCPC has, where no boundaries are learned from it.
    """
    state["args"] = unwrapped(state["args"])
    learns = state["args"].get("segmentationMode") == LEARNED and state["args"].get("multiLevel")
    used = {"segmentLevelCriterion.baseline"} if learns else set()
    state["cpcCriterion"] = {
        name: weight
        for name, weight in state["cpcCriterion"].items()
        if name in used or name.split(".")[-1] != "baseline"
    }
    state["optimizer"] = in_one_group(state.get("optimizer"))


def unwrapped(stored):
    """Stored flags, where lists of one value are that value if the flag takes only one here."""
    single = vars(build_parser().parse_args([])).keys() - LISTS
    return {
        name: value[0] if name in single and isinstance(value, list) and len(value) == 1 else value
        for name, value in stored.items()
    }


def renamed(logs):
    """Logs, where the losses of the levels have the names that this program gives them."""
    if not isinstance(logs, dict):  # damaged
        return logs
    return {
        name.removesuffix("_head0").replace("_head1", "_segments"): values
        for name, values in logs.items()
    }


def in_one_group(optimizer):
    """The state of an optimiser with its parameters in one group, the criterion's first, and the
    codes of segments, if there are any, in another.

    hCPC's groups are the model's codebooks, the model, the criterion's codebooks, the criterion.
    Other states are returned as they are.
    """
    try:
        _, model, codes, criterion = optimizer["param_groups"]
        order = [*criterion["params"], *model["params"], *codes["params"]]
        moments = [optimizer["state"].get(number) for number in order]
        n = len(order) - len(codes["params"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return optimizer
    return {
        "state": {i: its_own for i, its_own in enumerate(moments) if its_own is not None},
        "param_groups": [
            group | {"params": numbers}
            for group, numbers in ((model, list(range(n))), (codes, list(range(n, len(order)))))
            if numbers
        ],
    }
