"""Which trainers are compared, and with which settings."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peer:
    """A project to compare.

    Attributes:
        name: Its name.
        driver: The file in drivers/ that runs it.
        distribution: Its name on the package index; "" for this project, which runs in this environment.
        install: What pip gets, beside torch of this environment's version.
        remove: What is uninstalled again, because the index has it for CUDA only and text doesn't need it.
        data: The format of the records that it reads.
        shows: Where its documentation shows these settings.
    """

    name: str
    driver: str
    distribution: str
    install: tuple[str, ...]
    data: str
    shows: str
    remove: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Column:
    """A peer with settings.

    Attributes:
        title: Its name in the tables.
        peer: The peer's name.
        settings: What is set beside the model, the data, the batch and the length.
        base: The column of the same peer without packing, which answers the checks that packing doesn't touch.
        rows: Rows of a batch that holds all eight examples; fewer where the peer packs them itself.
        max_length: Tokens of an example, or of a pack.
        splits: Whether the batch can be split into micro-batches of known examples.
        cures: Check -> settings of an option that cures it.
    """

    title: str
    peer: str
    settings: dict = dataclasses.field(default_factory=dict)
    base: str = ""
    rows: int = 8
    max_length: int = 512
    splits: bool = True
    cures: dict[str, dict] = dataclasses.field(default_factory=dict)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "drive_ours.py", "", (), "alpaca", "docs/training.md"),
        Peer(
            "TRL",
            "drive_trl.py",
            "trl",
            ("trl==1.16.0", "sentencepiece", "protobuf"),
            "prompt-completion",
            "SFT Trainer: prompt-completion data sets, packing, padding-free",
        ),
        Peer(
            "LLaMA-Factory",
            "drive_llamafactory.py",
            "llamafactory",
            ("llamafactory==0.9.5",),
            "alpaca",
            "examples/train_full and data/README.md: the alpaca format and template",
            remove=("torchvision", "torchaudio"),
        ),
        Peer(
            "axolotl",
            "drive_axolotl.py",
            "axolotl",
            ("axolotl", "sentencepiece<0.2.2"),
            "alpaca",
            "dataset format alpaca; multipack (sample_packing)",
        ),
    )
}

PACK = 128  # tokens: the eight examples, of 57 to 114, fill five or six packs
COLUMNS = [
    Column("ours", "ours", cures={"splits": {"loss_reduction": "global"}}),
    Column("TRL", "TRL", cures={"chat": {"chat_template_path": "alpaca.jinja"}}),
    Column("TRL padding_free", "TRL", {"padding_free": True, "max_length": None}, base="TRL"),
    Column("TRL packing", "TRL", {"packing": True}, base="TRL", rows=0, max_length=PACK),
    Column(
        "TRL packing, wrapped",
        "TRL",
        {"packing": True, "packing_strategy": "wrapped"},
        base="TRL",
        rows=0,
        max_length=PACK,
    ),
    Column("LLaMA-Factory", "LLaMA-Factory"),
    Column("LLaMA-Factory packing", "LLaMA-Factory", {"packing": True}, "LLaMA-Factory", 0, PACK),
    Column("LLaMA-Factory neat_packing", "LLaMA-Factory", {"neat_packing": True}, "LLaMA-Factory", 0, PACK),
    Column("axolotl", "axolotl"),
    Column("axolotl sample_packing", "axolotl", {"sample_packing": True}, "axolotl", 1, 1024, splits=False),
]
