"""The protocol's convolutional networks: two convolution blocks and a dense head."""

from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1 to (batch, n_targets).

    Convolution, ReLU, 2x2 maximum, twice; then flatten, dropout, dense with ReLU, dense. Weights are drawn
    Glorot-uniform from torch's generator, biases are zero. The result does not depend on the memory format.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        n_targets: int,
        filters: tuple[int, int],
        kernel_size: int,
        same: bool,
        dropout: float,
        units: int,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        lost = 0 if same else kernel_size - 1  # pixels a valid convolution takes off each side length
        for _ in filters:
            height, width = (height - lost) // 2, (width - lost) // 2
        padding = kernel_size // 2 if same else 0
        self.first = nn.Conv2d(channels, filters[0], kernel_size, padding=padding)
        self.second = nn.Conv2d(filters[0], filters[1], kernel_size, padding=padding)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(height * width * filters[1], units)
        self.head = nn.Linear(units, n_targets)
        for name, values in self.named_parameters():
            (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(values)

    def forward(self, images: Tensor) -> Tensor:
        # The maximum before the ReLU gives the same numbers and gradients with a quarter of the ReLU's work.
        hidden = F.relu(F.max_pool2d(self.first(images), 2))
        hidden = F.relu(F.max_pool2d(self.second(hidden), 2))
        # Flattened as (height, width, filter): a view, not a copy, of channels-last activations.
        hidden = hidden.permute(0, 2, 3, 1).flatten(1)
        return self.head(F.relu(self.dense(self.dropout(hidden))))
