#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "floor.h"

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int stamp(int fd)
{
	int64_t at = now();

	return write(fd, &at, sizeof(at)) == sizeof(at) ? 0 : -1;
}

/* confine does what no container can be without. */
static int confine(const struct floor_paths *p, int fd)
{
	if (stamp(fd) || mount("", "/", "", MS_REC | MS_SLAVE, NULL))
		return -1;
	if (mount("overlay", p->merged, "overlay", 0, p->overlay) || stamp(fd))
		return -1;
	if (chdir(p->merged) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		return -1;
	return stamp(fd);
}

int floor_once(const struct floor_paths *p, int64_t ns[4])
{
	struct clone_args args = { 0 };
	char *const argv[] = { (char *)p->program, NULL }, *const env[] = { NULL };
	int64_t at[3], began;
	int pipes[2], status, rc = 0;
	char end;

	if (pipe2(pipes, O_CLOEXEC))
		return errno;
	args.flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
	if (!p->sandbox)
		args.flags |= CLONE_NEWNET;
	args.exit_signal = SIGCHLD;
	began = now();
	pid_t pid = syscall(SYS_clone3, &args, sizeof(args));
	if (pid == 0) {
		if (confine(p, pipes[1]) == 0)
			execve(p->program, argv, env);
		_exit(errno ? errno : 1);
	}
	if (pid < 0)
		rc = errno;
	close(pipes[1]);
	for (int i = 0; rc == 0 && i < 3; i++)
		if (read(pipes[0], &at[i], sizeof(at[i])) != sizeof(at[i]))
			rc = -1;
	if (rc == 0 && read(pipes[0], &end, 1) != 0) /* execve(2) closes it */
		rc = EIO;
	ns[3] = now() - at[2];
	ns[0] = at[0] - began;
	ns[1] = at[1] - at[0];
	ns[2] = at[2] - at[1];
	close(pipes[0]);
	if (pid > 0 && waitpid(pid, &status, 0) == pid && (rc || !WIFEXITED(status) || WEXITSTATUS(status)))
		rc = WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : EIO;
	return rc;
}
