#include "trainer/signals.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

static volatile sig_atomic_t stop_signal; // the first that came
static volatile sig_atomic_t asked;       // the end was requested

// Ends the process by a signal's default action: in its handler as soon as that returns.
static void die_by(int number) {
  signal(number, SIG_DFL);
  raise(number);
}

static void ask_stop(int number) {
  if (asked) die_by(number);
  asked = 1;
  if (!stop_signal) stop_signal = number;
}

// The terminal or the reader of the log is gone. Both may say so several times (the kernel and the shell each send
// SIGHUP, every lost line brings SIGPIPE), and a machine that shuts down sends SIGTERM too: no more haste than once.
static void note_hangup(int number) {
  if (!stop_signal) stop_signal = number;
}

static void catch_signal(int number, void (*handler)(int)) {
  // A signal that comes while a checkpoint is written must not make that fail.
  struct sigaction caught = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  if (sigaction(number, NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(number, &caught, NULL);
}

void signals_catch(void) {
  catch_signal(SIGINT, ask_stop);
  catch_signal(SIGTERM, ask_stop);
  catch_signal(SIGUSR1, ask_stop);
  catch_signal(SIGHUP, note_hangup);
  catch_signal(SIGPIPE, note_hangup);
  signal(SIGXFSZ, SIG_IGN); // a file at its size limit is an error like a full disk
}

int signals_stop(void) {
  return stop_signal;
}

int signals_check(Error *err) {
  return stop_signal ? error_set(err, NULL, "stopped by a signal") : 0;
}

void signals_die(void) {
  if (!stop_signal || stop_signal == SIGUSR1) return;
  fflush(stdout);
  die_by(stop_signal);
  _exit(128 + stop_signal); // the first process of a container has no default action
}
