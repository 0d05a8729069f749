"""The device's state machine, and what a shell around it must do.

The core decides, the shell acts: it owns the clock, the disk, the connection, the trainer and every thread. What the
protocol promises holds if the shell keeps this contract. `edge.shell.service` is one shell, the simulation another.

1. **One core.** Make one `Core` for a device, from its `Profile`, from the `State` that the last `Save` wrote (for a
   new device from `State(key=profile.key)`) and, to save a download, from the task's `InitialModel`. No other process
   uses the same state meanwhile. After a crash make another; the core needs nothing else of the one before.
2. **One event at a time.** Call `handle(event, now)` in one thread, first with `Started`; or `take` for each of several
   events that wait, then `proceed` once. ``now`` is in seconds of a clock that never goes back. The core keeps no
   clock, no thread, and no randomness but the ``seal`` of its profile.
3. **Actions in order.** Perform the actions that `handle` or `proceed` returns, all of them and in their order, before
   the next event. If one fails, perform none of those after it: end the process, and start again from the disk.
4. **Save.** Write the state, and the answered update if there is one, to stable storage in one transaction, before the
   next action. The actions after it may publish what only this write remembers. A save that is not ``durable`` may be
   lost with the power; then nothing that was saved after it may be kept. With an answered update it must outlive the
   process: the federation may close after a crash, and the core then drops an update without a receipt. Without one it
   may be put off until the next save, but for a second at most.
5. **Time.** After each `handle` or `proceed`, ask `due_s`, and handle `TimeReached` when ``now`` has reached it, if
   nothing happens before. Too early does no harm; too late causes a delay.
6. **Connect.** Open a connection to the broker with a persistent session, QoS 1, and the given last will, retained.
   Answer with one `Connected` or one `ConnectFailed`, and end each `Connected` with one `Disconnected`, also when the
   broker took the session away. After `Disconnected` nothing of that connection may arrive any more.
7. **Subscribe, Unsubscribe, Publish.** Send them, in order, on the connection. Where there is none, drop them: the core
   learns of it by `Disconnected`, and repeats what matters. Handle one `Published` or `Refused`, with the ``seq`` of
   the action, for each publication that the broker acknowledges. Never send a publication of an earlier connection.
8. **Frames.** Parse each payload with `frame.parse`, and handle `FrameArrived`, or `FrameMalformed` with the error's
   reason. Ignore empty payloads, which clear a retained topic. Acknowledge a message to the broker after the actions
   that it led to. Verify no signature: the core does.
9. **Jobs.** Run `StartTraining`, `StartEvaluation` and `StartFineTuning` beside the core, one after the other, without
   modifying their arrays. Each ends in one event with the base or version of the job: `TrainingFinished`,
   `TrainingFailed` or `BudgetSpent`; `Evaluated` or `EvaluationFailed`; `FineTuned` or `FineTuningFailed`. A failure of
   the task's code ends the job, never the process: the event says why, and the core starts the job again later. Under a
   plan with `dp`, where others would notice it, a failure is in `TrainingFinished` or `Evaluated`. A job that a crash
   cut short needs no trace: the core starts it again.
10. **SaveModel, Log.** Write the file; print the log. Neither has an answer.
11. **Stop.** Flush what was published, disconnect so that the broker does not publish the last will, and end with the
    code. `StopRequested` asks for it. The core ignores every event after it. A process that ends otherwise closes the
    connection without DISCONNECT, so that the broker publishes the last will.

The states of the connection, and of the work, which continues while the device is disconnected:

    connection    meaning                                  entered by                           status published
    disconnected  the next attempt has a time              the start, ConnectFailed,            by the broker: the last
                                                           Disconnected                         will, "offline"
    connecting    `Connect` is not answered yet            the time of the next attempt         none
    connected     it publishes and follows the model       Connected                            that of the work

    work          meaning                                  entered by                           status published
    enrolling     enrollment is sent until a receipt       a start with a key that is not       none: the key could not
                  admits the key                           enrolled                             be checked
    following     snapshot and deltas are requested until  enrollment; a head of a version or   "idle"
                  the vector is the head's                 other digest than the vector
    idle          a condition of `TrainingPolicy.begin`    the head's vector; a receipt; a      "idle"
                  is not met                               training that failed
    training      the shell trains on the head's version   `StartTraining`                      "training" and its base
    outstanding   an update on disk is sent, or offered    TrainingFinished; a start with an    "idle"
                  and granted, until a receipt comes       update on disk
    leaving       fine-tuning and the last metrics remain  a closed head; as many versions as   as before
                                                           `Profile.versions`
    stopped       every event is ignored                   `Stop`, with its exit code           "offline"

A device that is enrolling is in no other state; otherwise it is in the lowest state of the table that applies. It
follows the model in every state but "stopped", and evaluates a new version whenever it does not train. It publishes its
status, retained, at each connect, at enrollment, when a training begins or ends (of quick ones not each), at the first
old head after a connect or after one that it accepted, and at the end; with the roles "join" and "export" only at the
end.
"""
