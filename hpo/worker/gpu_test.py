"""A process that shows whether a GPU can train: one forward and one backward pass of a small network on it."""

from hpo.worker import protocol
from hpo.worker.channel import Channel, serve


def show(channel: Channel) -> None:
    """Send Ready if the GPU that this process sees can train, else Failed with the reason; then wait for the end."""
    import torch

    try:
        if torch.version.cuda is None:
            raise RuntimeError(
                "the installed PyTorch is a build without CUDA (`make TORCH=default run` installs the other one)"
            )
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch cannot use it. Does `nvidia-smi` show it, and is its driver new enough?")
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 1)).cuda()
        loss = network(torch.ones(2, 1, 8, 8, device="cuda")).square().mean()
        loss.backward()
        if not torch.isfinite(loss).item():
            raise RuntimeError("a small network gave no finite number on it")
    except Exception as error:
        channel.send(protocol.Failed(reason=str(error).strip().partition("\n")[0]))
    else:
        channel.send(protocol.Ready())
    channel.requests.get()


if __name__ == "__main__":
    serve(show)
