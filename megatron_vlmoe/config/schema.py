"""The configuration tree: one frozen dataclass per section, one class for a whole run.

Every field is reachable as ``--section.field VALUE`` on the command line and as ``section: {field: VALUE}``
in a YAML file. Fields that the paper (arXiv 2303.07226) leaves open are explained in docs/fidelity.md.
Checks that need more than one section live in :mod:`megatron_vlmoe.planning.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The MoME Transformer (paper section 3.2).

    Args:
        num_layers: number of blocks, L.
        hidden_size: width of the token stream, D.
        num_attention_heads: heads of the shared self-attention.
        ffn_hidden_size: inner width of every FFN and every expert.
        num_vl_layers: F, the last blocks in which tokens of pairs use the VL-FFN.
        image_size: side of the square input image in pixels.
        patch_size: side of a patch in pixels.
        text_length: tokens of a packed text, [T_CLS] and [T_SEP] included.
        pair_text_length: token slots of a caption, [T_CLS] and [T_SEP] included; shorter ones are padded.
        vocab_size: text tokens; 0 takes their number from the text tokenizer.
        visual_vocab_size: visual tokens; 0 takes their number from the image tokenizer.
        layernorm_epsilon: epsilon of every LayerNorm.
        layer_scale_init: initial LayerScale; 0 builds the model without LayerScale.
        drop_path: stochastic depth of the last block; earlier blocks grow linearly from 0.
        init_std: standard deviation of the truncated normal (cut at one standard deviation, as BEiT).
        init_sincos_std: root mean square of initial positions that are sines and cosines of a token's place, of a
            patch's row and column; 0 draws them as other weights. Neighbours then start alike.
        init_qk_correlation: correlation of initial key and query weights of a head, 0 to 1. Above 0 a token starts
            by attending to what is like it (mimetic initialization, arXiv 2305.09828).
        token_type_embeddings: adds learned modality embeddings (the paper's formulas have none).
        transformer_impl: whose layers the blocks are made of: `local` are megatron-core's and torch's;
            `transformer_engine` has TransformerEngine's linear layers, with the LayerNorm before them where that has no
            other use, and its attention (on a GPU); `auto` is the latter where it is installed and there is a GPU, else
            `local`. Parameters, initial values and checkpoints are the same.
        attention_backend: `sdpa` is torch's scaled_dot_product_attention, without cuDNN's kernel where there is a mask;
            `math` forces its plain kernel; `varlen` is its flash attention over sequences of different lengths, one
            call for all samples and none of their padding (on a GPU, in bf16 or fp16). `auto` is TransformerEngine's
            attention over such sequences where `transformer_impl` is, in bf16 and fp16 and without
            `moe.route_padding`, else `sdpa`.
    """

    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    ffn_hidden_size: int = 3072
    num_vl_layers: int = 3
    image_size: int = 224
    patch_size: int = 16
    text_length: int = 128
    pair_text_length: int = 128
    vocab_size: int = 0
    visual_vocab_size: int = 0
    layernorm_epsilon: float = 1e-6
    layer_scale_init: float = 0.1
    drop_path: float = 0.1
    init_std: float = 0.02
    init_sincos_std: float = 0.0
    init_qk_correlation: float = 0.0
    token_type_embeddings: bool = False
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "local"
    attention_backend: Literal["auto", "sdpa", "math", "varlen"] = "auto"

    @property
    def patch_grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, N."""
        return self.patch_grid**2

    @property
    def image_length(self) -> int:
        """Tokens of an image: [I_CLS] and N patches."""
        return self.num_patches + 1


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """Weights of the auxiliary losses of one modality, before `moe.aux_loss_coefficient`.

    A shared router has the entropies for each modality apart (LIMoE): those of `text_aux` over its text tokens, those
    of `vision_aux` over its image tokens; and the other losses of `vision_aux` over all of them.

    Args:
        importance: squared coefficient of variation of the summed gates (paper A.3).
        load: squared coefficient of variation of the expected assignments (paper A.3).
        z: mean squared log-sum-exp of the logits (paper A.3, ST-MoE).
        gshard: expert share times mean gate (GShard, Switch Transformer).
        local_entropy: mean entropy of a token's gates (LIMoE).
        global_entropy: negative entropy of the mean gates, thresholded (LIMoE).
        global_entropy_experts: soft minimum number of experts in use, tau = log of it; 0 is no threshold.
    """

    importance: float = 0.0
    load: float = 0.0
    z: float = 0.0
    gshard: float = 0.0
    local_entropy: float = 0.0
    global_entropy: float = 0.0
    global_entropy_experts: float = 0.0

    def active_terms(self) -> tuple[str, ...]:
        """Names of the losses with a weight, in the order of the fields."""
        names = ("importance", "load", "z", "gshard", "local_entropy", "global_entropy")
        return tuple(name for name in names if getattr(self, name) != 0.0)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sparse experts in the V-FFN and T-FFN (paper sections 3.2 and 4.1).

    Args:
        num_vision_experts: experts of a V-MoE layer; 0 keeps the dense V-FFN.
        num_text_experts: experts of a T-MoE layer; 0 keeps the dense T-FFN.
        num_vl_experts: experts on the VL-FFN (with `vl`).
        layers: blocks with experts, counted from 1, as `2 4 6`; empty means the even blocks of the first L - F.
        modalities: which tokens have experts: those of text, of images, both or none.
        vl: experts on the VL-FFN of the listed blocks too (the paper's future work).
        shared_router: one pool for tokens of both modalities (LIMoE, V-MoE); its size is num_vision_experts.
        routing: `token_choice` sends every token to its k best experts; `expert_choice` gives every expert the tokens
            that it scores highest, as many as it has slots (Zhou et al. 2022), so that a token has none to all experts.
        topk: experts per token, k; with expert choice their mean number at a capacity factor of 1.
        capacity_factor: slots of an expert in training, as a multiple of an equal share of the tokens; 0 or less
            drops nothing.
        eval_capacity_factor: the same in evaluation.
        capacity_multiple_of: rounds a capacity up to a multiple of this.
        noise_std: standard deviation of the router noise in training; negative means 1 / E.
        batch_priority: Batch Priority Routing: tokens with a larger gate take their place first.
        normalize_gate: divides the k gates by their sum.
        balance_bias_rate: u of loss-free balancing (arXiv 2408.15664): every step moves a bias of each expert, which is
            added to its gates for the choice of experts alone, by u towards equal load; 0 is no bias.
        dispatcher: `fixed_capacity` (static shapes), `alltoall` (megatron-core's) or `dropless`.
        all_to_all_chunks: groups of a rank's experts whose tokens `fixed_capacity` sends by themselves, while the
            experts of other groups compute; at most one per expert of the rank. Without expert parallelism it changes
            nothing.
        route_padding: sends padding tokens of captions to experts (as the paper did).
        aux_loss_coefficient: weight of the auxiliary losses in the total.
        text_aux: Auxiliary losses of the text routers, and entropies of the text tokens of shared routers
        vision_aux: Auxiliary losses of the vision routers, of shared routers and of the VL routers; entropies of shared
            routers are those of their image tokens
        train_experts: false freezes experts and routers (fine-tuning): no noise and no auxiliary loss.
    """

    num_vision_experts: int = 0
    num_text_experts: int = 0
    num_vl_experts: int = 0
    layers: tuple[int, ...] = ()
    modalities: Literal["both", "text", "vision", "none"] = "both"
    vl: bool = False
    shared_router: bool = False
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    topk: int = 1
    capacity_factor: float = 1.05
    eval_capacity_factor: float = 1.0
    capacity_multiple_of: int = 1
    noise_std: float = -1.0
    batch_priority: bool = True
    normalize_gate: bool = False
    balance_bias_rate: float = 0.0
    dispatcher: Literal["fixed_capacity", "alltoall", "dropless"] = "fixed_capacity"
    all_to_all_chunks: int = 1
    route_padding: bool = False
    aux_loss_coefficient: float = 0.01
    text_aux: AuxLossConfig = field(default_factory=lambda: AuxLossConfig(load=1.0))
    vision_aux: AuxLossConfig = field(
        default_factory=lambda: AuxLossConfig(importance=0.5, load=0.5)
    )
    train_experts: bool = True


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """Masked data modelling (paper section 3.1), or contrastive pretraining (paper A.1, LIMoE).

    Args:
        kind: `masked` predicts hidden tokens and patches; `contrastive` reads captions and images of pairs apart, and
            finds for each the other among those of all data-parallel ranks in its micro-batch. It needs no image
            tokenizer, and no other option of this section but the temperature.
        contrastive_temperature: first temperature of the softmax over similarities; it is learned.
        mlm_weight: weight of the masked language loss of texts.
        mim_weight: weight of the masked image loss of images.
        vlm_text_weight: weight of the masked token loss of pairs.
        vlm_image_weight: weight of the masked patch loss of pairs.
        text_mask_fraction: share of the tokens of a text that are predicted.
        caption_mask_fraction: share of the tokens of a caption that are predicted.
        num_masked_patches: patches that are predicted per image; 0 means floor(0.4 N).
        min_mask_block: smallest block of the block-wise mask, in patches (BEiT: 16 of 196).
        caption_mask_slots: most predicted tokens of one caption; 0 derives it from the data
            (caption_mask_fraction of the 99th percentile caption length).
    """

    kind: Literal["masked", "contrastive"] = "masked"
    contrastive_temperature: float = 0.07
    mlm_weight: float = 1.0
    mim_weight: float = 1.0
    vlm_text_weight: float = 1.0
    vlm_image_weight: float = 1.0
    text_mask_fraction: float = 0.15
    caption_mask_fraction: float = 0.5
    num_masked_patches: int = 0
    min_mask_block: int = 16
    caption_mask_slots: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Indexed datasets, tokenizers, batch sizes and augmentation.

    Args:
        text: prefixes of text datasets, or a blend `0.7 PREFIX 0.3 PREFIX`.
        images: prefixes of image datasets, or a blend.
        pairs: prefixes of image-text datasets, or a blend.
        eval_text: held-out texts; empty holds out the last `eval_fraction` of each of `text`.
        eval_images: held-out images; empty holds out the last `eval_fraction` of each of `images`.
        eval_pairs: held-out pairs; empty holds out the last `eval_fraction` of each of `pairs`.
        eval_fraction: share of the documents that is held out where no eval dataset is given.
        text_tokenizer: SentencePiece model file.
        image_tokenizer: folder of a VQ-KD tokenizer, or the official BEiT v2 file.
        image_tokenizer_precision: of its encoder where codes are computed in training; `bf16` is faster on a GPU, and
            gives some patches another code.
        codes: `auto` reads visual tokens from PREFIX_codes where every image dataset has them, else computes
            them on the fly; `stored` demands them; `compute` ignores them.
        micro_texts: texts in a micro-batch of one data-parallel rank.
        micro_images: images in a micro-batch of one data-parallel rank.
        micro_pairs: pairs in a micro-batch of one data-parallel rank.
        global_texts: texts in a step over all ranks and micro-batches.
        global_images: images in a step over all ranks and micro-batches.
        global_pairs: pairs in a step over all ranks and micro-batches.
        pair_unit: `caption` makes an epoch run over all (image, caption) pairs; `image` draws one caption per image.
        reset_attention: restarts attention at every document inside a packed text.
        crop_scale_min: smallest share of the image that a random crop keeps.
        color_jitter: strength of brightness, contrast and saturation jitter (BEiT: 0.4).
        flip_probability: probability of a horizontal flip of image-only samples.
        pair_flip_probability: probability of a horizontal flip of pairs (a flip makes "left" and "right" false).
        pixel_mean: mean of each channel, in 0..1, for the model's input.
        pixel_std: standard deviation of each channel, in 0..1.
        on_bad_image: what becomes of a stored image that cannot be decoded: `stop` ends the run with an error,
            `replace` trains on a grey one in its place (pretraining).
        max_bad_images: more replaced images than this, over all ranks, end the run at the next logged step.
        num_workers: loader processes per rank; 0 loads in the training process, -1 takes this rank's cores but one, at
            most 8.
        prefetch: batches that each worker prepares ahead.
        cache_dir: folder in which the processes of a machine share tables of the order of large datasets; empty for one
            in the system's folder for temporary files.
        verify: how datasets are compared with their manifests at the start: `sizes` of files, or `full`, which reads
            them all and compares their SHA-256.
    """

    text: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    eval_images: tuple[str, ...] = ()
    eval_pairs: tuple[str, ...] = ()
    eval_fraction: float = 0.02
    text_tokenizer: str = ""
    image_tokenizer: str = ""
    image_tokenizer_precision: Literal["fp32", "bf16"] = "fp32"
    codes: Literal["auto", "stored", "compute"] = "auto"
    micro_texts: int = 64
    micro_images: int = 64
    micro_pairs: int = 64
    global_texts: int = 2048
    global_images: int = 2048
    global_pairs: int = 2048
    pair_unit: Literal["caption", "image"] = "caption"
    reset_attention: bool = False
    crop_scale_min: float = 0.2
    color_jitter: float = 0.4
    flip_probability: float = 0.5
    pair_flip_probability: float = 0.5
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    on_bad_image: Literal["stop", "replace"] = "stop"
    max_bad_images: int = 100
    num_workers: int = -1
    prefetch: int = 2
    cache_dir: str = ""
    verify: Literal["sizes", "full"] = "sizes"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule (paper section 4.1).

    Args:
        optimizer: `adam` is AdamW; `sgd` is for comparisons.
        lr: peak learning rate.
        min_lr: learning rate at the end of the decay.
        lr_warmup_steps: steps of linear warm-up.
        lr_decay_style: shape of the decay after the warm-up.
        lr_decay_steps: step at which the decay ends; 0 means `train.steps`.
        layer_decay: factor of the learning rate from one block to the one below it (BEiT); the heads and the last
            LayerNorm have the full rate, the embeddings `layer_decay ** (L + 1)`; 1 is the same rate for all.
        head_lr_multiplier: factor of the learning rate of the heads but the pooler (VLMo: 20 for question answering).
        weight_decay: decoupled weight decay of matrices; vectors, positions and special embeddings have none.
        adam_beta1: decay of Adam's first moment.
        adam_beta2: decay of Adam's second moment.
        adam_eps: epsilon in the denominator of Adam.
        sgd_momentum: momentum of `sgd`.
        clip_grad: largest gradient norm; 0 does not clip.
        initial_loss_scale: first loss scale of fp16.
        min_loss_scale: smallest loss scale of fp16.
        loss_scale_window: steps without overflow before the scale doubles.
        hysteresis: overflows before the scale is halved.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 2e-3
    min_lr: float = 1e-5
    lr_warmup_steps: int = 10_000
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_steps: int = 0
    layer_decay: float = 1.0
    head_lr_multiplier: float = 1.0
    weight_decay: float = 0.05
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.0
    clip_grad: float = 3.0
    initial_loss_scale: float = 65536.0
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks; names are megatron-core's.

    Args:
        tensor_model_parallel_size: TP; sequence parallelism is on whenever it is above 1.
        pipeline_model_parallel_size: PP; pipeline stages over which the blocks are spread.
        virtual_pipeline_model_parallel_size: model chunks per pipeline stage (interleaved schedule); 1 is 1F1B.
        expert_model_parallel_size: EP; each rank owns E / EP experts of each pool.
        expert_tensor_parallel_size: ETP; only 1 is supported.
        context_parallel_size: CP; only 1 is supported (a pair has 325 tokens).
        use_distributed_optimizer: shards optimizer state over data parallel ranks.
        overlap_grad_reduce: reduces gradients while the backward pass runs.
        overlap_param_gather: gathers updated parameters while the forward pass runs.
        batch_p2p_comm: must be false with virtual stages (megatron-core 0.16.1 then computes wrong values).
        distributed_timeout_minutes: time after which a stuck collective is an error.
        startup_timeout_minutes: time in which all processes must have come together when a run starts.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = False
    batch_p2p_comm: bool = False
    distributed_timeout_minutes: int = 30
    startup_timeout_minutes: float = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, precision and evaluation of a run.

    Args:
        steps: optimizer steps of the whole run.
        seed: seed of initial weights, data order, masks, router noise and stochastic depth.
        precision: `auto` is bf16 where the GPU has it, fp16 on older GPUs, fp32 on CPU.
        fp8: in training, computes matrix products of blocks in 8 bits, by a recipe of TransformerEngine: `delayed`
            scales a tensor by its maxima in earlier steps, `tensorwise` by its own, `blockwise` every 128 values apart
            (Hopper and newer), `mxfp8` every 32 (Blackwell). Needs bf16 and TransformerEngine's layers.
        deterministic: deterministic kernels on GPU (CPU runs always are).
        compile: compiles functions of a block that torch would run as many small kernels: bias and GELU of FFNs, the
            end of a branch, what routers count and sort, and in 16 bits, without tensor parallelism, cross entropy.
        counter_draws: computes router noise and stochastic depth of a micro-batch from its number in a few operations
            on the device, in place of a generator for every draw; the numbers are others.
        cuda_graph: replays forward and backward of a step as one CUDA graph from the fourth step on; needs
            counter_draws, one pipeline stage and shapes that do not depend on the routing.
        recompute: `full` recomputes each block in the backward pass.
        head_chunk_rows: predicted positions whose logits a rank holds at once; more are computed chunk by chunk, and
            again in the backward pass. 0: all at once, once.
        eval_interval: steps between evaluations; 0 evaluates only at step 0 and at the end.
        eval_steps: evaluation steps (each of the global batch size); 0 turns evaluation off.
        exit_interval: saves and exits when the step is a multiple of this; 0 never.
        exit_duration_minutes: saves and exits after this time; 0 never.
        exit_signals: signals at which the run saves and exits cleanly.
        stop_on_nan: false takes an update whose gradients are not finite as any other, whatever `health.on_nonfinite`
            says (fp16 overflow steps are skipped in any case).
    """

    steps: int = 200_000
    seed: int = 1234
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    deterministic: bool = False
    compile: bool = False
    counter_draws: bool = False
    cuda_graph: bool = False
    recompute: Literal["none", "full"] = "none"
    head_chunk_rows: int = 0
    eval_interval: int = 1000
    eval_steps: int = 10
    exit_interval: int = 0
    exit_duration_minutes: float = 0.0
    exit_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    stop_on_nan: bool = True


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What a run does about steps that go wrong, ranks that fail, and ranks that nothing is heard of.

    Args:
        on_nonfinite: where the gradient norm is not finite, before the update: `stop` ends the run with an error,
            `skip` goes on without this update, `rewind` loads the last checkpoint and goes on with the data behind
            this step.
        on_spike: the same where the gradient norm is a spike; `none` does not look for spikes.
        spike_window: a spike is judged by the median gradient norm of so many updates before; there is none before
            there are as many.
        spike_factor: a gradient norm above this multiple of the median is a spike.
        max_skips: steps in a row that are skipped; one more ends the run.
        max_rewinds: how often a run goes back to the same checkpoint; once more ends it.
        hang_factor: the run ends, with the stacks of all ranks in SAVE/health/, if a step takes more than this multiple
            of the median step; 0 leaves hangs to `parallel.distributed_timeout_minutes`.
        hang_seconds: a step that takes less than this is never taken for a hang.
        straggler_factor: warns of a rank whose forward passes take longer than this multiple of the median rank of its
            pipeline stage, at three logged steps in a row; 0 does not measure them.
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["none", "stop", "skip", "rewind"] = "none"
    spike_window: int = 100
    spike_factor: float = 10.0
    max_skips: int = 5
    max_rewinds: int = 3
    hang_factor: float = 20.0
    hang_seconds: float = 300.0
    straggler_factor: float = 1.5


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go and what is loaded.

    Args:
        save: run folder: `checkpoints/`, `metrics.jsonl`, `config.yaml` and `tensorboard/` live in it.
        load: run or checkpoint folder to start from; empty resumes from `save` if it has a checkpoint.
        step: which checkpoint of the run folder (`save` if it has any, else `load`): `newest`, a step, or empty for
            the one that its tracker names; not kept in config.yaml.
        save_interval: steps between checkpoints; 0 saves only at the end.
        keep_last: checkpoints that are kept; 0 keeps all.
        save_initial: writes the weights before the first step (iter_0000000) as a seed for other layouts.
        load_optimizer: takes optimizer and step from `load` too; false takes only the weights and starts at step 0.
        async_save: writes checkpoints in the background while training goes on.
        require: fails if there is nothing to resume from.
        optimizer_format: how optimizer state is stored, in megatron-core's words. `fully_reshardable` loads at any
            layout, but every rank gathers the state of all data-parallel ranks to write it. With `dp_reshardable`
            every rank writes its own share; it loads at the same TP, PP, EP and buckets, with any number of
            data-parallel ranks. `auto` is the latter, and the former for the last checkpoint, also of a clean exit.
        parallel_load: every data-parallel rank reads its share and sends it to the others, in place of all of them
            reading everything.
        verify: compares every file of a checkpoint with its SHA-256 before it is loaded.
        on_damage: what a run does whose own last checkpoint is damaged: `stop` with an error, or go on from the
            newest `previous` one that is not.
    """

    save: str = ""
    load: str = ""
    step: str = ""
    save_interval: int = 1000
    keep_last: int = 3
    save_initial: bool = False
    load_optimizer: bool = True
    async_save: bool = False
    require: bool = False
    optimizer_format: Literal["fully_reshardable", "dp_reshardable", "auto"] = "fully_reshardable"
    parallel_load: bool = False
    verify: bool = True
    on_damage: Literal["stop", "previous"] = "stop"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports.

    Args:
        interval: steps between logged steps.
        tensorboard: writes TensorBoard events.
        wandb_project: Weights & Biases project; empty turns it off.
        wandb_name: name of the W&B run.
        moe_per_layer: adds per-layer MoE statistics to metrics.jsonl.
    """

    interval: int = 10
    tensorboard: bool = False
    wandb_project: str = ""
    wandb_name: str = ""
    moe_per_layer: bool = True


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Torch profiler.

    Args:
        steps: first and last step to record, as `10 12`; empty records nothing.
        ranks: ranks that write a trace.
        with_memory: records allocations too.
    """

    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)
    with_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. The descriptions of its sections are the headings of `--help`.

    Args:
        model: Model
        moe: Mixture of experts
        objectives: Pretraining losses and masks
        data: Data, batch sizes and augmentation
        optim: Optimizer and learning rate
        parallel: Parallel layout over processes
        train: Length, precision and evaluation of the run
        health: Steps that go wrong, and ranks that fail or hang
        checkpoint: Checkpoints: saving, loading and resuming
        log: Logging
        profile: Profiling
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


Precision = Literal["fp32", "bf16", "fp16"]
