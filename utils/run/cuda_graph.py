"""A training step without the launches: its kernels recorded once, as a CUDA graph.

A step launches hundreds of kernels, most of which keep a GPU busy for less time than a processor
needs to launch them. Replaying a graph launches all of them at once.
"""

import torch

WARM_UP = 3  # steps before recording, in which libraries choose their kernels


def can_be_recorded(args, device, world):
    """Whether --compile may record the passes: on a single GPU, if all steps are alike.

    They aren't if hidden state is kept, a loss (CTC) waits for the device, or the number of
    segments changes from step to step.
    """
    alike = not (args.samplingType == "sequential" or args.supervised or args.multiLevel)
    return args.compile and device.type == "cuda" and world.size == 1 and alike


class RecordedPasses:
    """The forward and backward pass of batches of one size, replayed from a CUDA graph.

    passes: Batch -> tuple of tensors; leaves gradients in `parameters`, which had none. It must do
        the same operations for each batch of `batch_size` windows, draw from no generator but the
        device's default one, and never wait for the device.

    Call it like `passes`. The first batches, and all of another size, are not replayed. If the
    device refuses to record, a note is printed once and nothing is replayed.
    """

    def __init__(self, passes, parameters, batch_size):
        self.passes, self.parameters, self.batch_size = passes, list(parameters), batch_size
        self.steps_to_recording = WARM_UP
        self.stream = torch.cuda.Stream()
        self.graph = None

    def __call__(self, batch):
        if len(batch.window) != self.batch_size or self.steps_to_recording is None:
            return self.passes(batch)
        if self.steps_to_recording:
            self.steps_to_recording -= 1
            return self.warm_up(batch)
        if self.graph is None and not self.record(batch):
            self.steps_to_recording = None
            return self.passes(batch)
        return self.replay(batch)

    def warm_up(self, batch):
        """Do the passes on a stream that isn't the default one, as recording will."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.passes(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self, batch):
        """Record the passes without doing them; returns whether that went well.

        torch.cuda.graph leaves its own stream current if the recording can't be ended: hence the
        outer block, which restores the previous one.
        """
        self.batch = batch.each(torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.results = self.passes(self.batch)
        except RuntimeError as error:
            cause = error.__context__ or error  # why the passes failed, if they broke the recording
            reason = str(cause).partition("\n")[0]
            print(f"note: steps are launched kernel by kernel; they can't be recorded ({reason})")
            self.leave_recording()
            return False
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph
        return True

    def leave_recording(self):
        """Undo what a failed recording leaves behind.

        The device's generator still counts its draws for the graph, and refuses any others: a copy
        of its state doesn't.
        """
        for parameter in self.parameters:
            parameter.grad = None
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())

    def replay(self, batch):
        for held, tensor in zip(self.batch, batch, strict=True):
            if held is not None:
                held.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return tuple(result.clone() for result in self.results)  # the next replay overwrites them
