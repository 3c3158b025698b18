"""A CPC model for Hugging Face's `transformers`.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    outputs = model(waveform)  # (batch, samples) at 16 kHz

`outputs.last_hidden_state` are the contexts, `outputs.extract_features` the encoded frames.
"""

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import Wav2Vec2BaseModelOutput

from .cpc_layers import CPCNetwork


class CPCConfig(PretrainedConfig):
    """Widths and layers of a CPC model.

    conv_dim: width of encoded frames; hidden_size: of contexts; norm: layerNorm (over channels),
    batchNorm, instanceNorm or ID (none); linear_output: no ReLU after the last norm; ar_mode: LSTM,
    GRU, RNN or no_ar, with `num_ar_layers`
    """

    model_type = "cpc"
    conv_dim = 256
    hidden_size = 256
    norm = "layerNorm"
    linear_output = False
    ar_mode = "LSTM"
    num_ar_layers = 1
    sampling_rate = 16000


class CPCModel(PreTrainedModel):
    """An encoder of 10 ms frames and a context network that summarises all frames so far."""

    config_class = CPCConfig
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.cpc = CPCNetwork(
            config.conv_dim,
            config.hidden_size,
            config.norm,
            config.linear_output,
            config.ar_mode,
            config.num_ar_layers,
        )
        self.post_init()

    def forward(self, input_values, return_dict=None, **kwargs):
        """input_values: (batch, samples) at 16 kHz in [-1, 1], not normalised.

        Returns last_hidden_state, the contexts (batch, frames, hidden_size), and extract_features,
        the encoded frames (batch, frames, conv_dim); frames = samples // 160. Other arguments, such
        as an attention mask, have no effect: contexts don't depend on what comes after them.
        """
        contexts, encoded = self.cpc(input_values)
        if return_dict is False:
            return contexts, encoded
        return Wav2Vec2BaseModelOutput(last_hidden_state=contexts, extract_features=encoded)
