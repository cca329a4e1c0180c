package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTheProgramOfAHandlerIsFound(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"there": 0o755, "not-executable": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho version 1\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for path, says := range map[string]string{
		"there": "", filepath.Join(dir, "there"): "", // by name, by path
		"absent": "executable file not found", filepath.Join(dir, "absent"): "no such file",
		"not-executable": "executable file not found", filepath.Join(dir, "not-executable"): "permission denied",
	} {
		handlers := map[string]handlerConfig{"h": {Path: path}}
		err := checkHandlers(handlers)
		if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "handlers.h:")) {
			t.Errorf("%s: %v does not say %q", path, err, says)
		}
		var log bytes.Buffer
		got := podHandlers(context.Background(), handlers, slog.New(slog.NewTextHandler(&log, nil)))["h"]
		if says == "" && (got.Path != filepath.Join(dir, "there") || got.Facts.Version != "version 1" || log.Len() > 0) {
			t.Errorf("%s: %+v, log %s", path, got, log.String())
		}
		if says != "" && (got.Path != path || !strings.Contains(log.String(), says)) {
			t.Errorf("%s: %+v, log %s", path, got, log.String())
		}
	}
}

func TestARelativePathOfAHandlerIsMeantFromTheFile(t *testing.T) {
	c, err := resolve(t, "handlers: {a: {path: bin/crun}, b: {path: crun}, c: {path: /usr/bin/crun, args: [\"--debug\"], sandbox: true}}\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Handlers["a"].Path; !filepath.IsAbs(got) || filepath.Base(filepath.Dir(got)) != "bin" {
		t.Errorf("a: %q", got)
	}
	if got := c.Handlers["b"].Path; got != "crun" {
		t.Errorf("b: %q", got)
	}
	if got := c.Handlers["c"]; got.Path != "/usr/bin/crun" || len(got.Args) != 1 || !got.Sandbox {
		t.Errorf("c: %+v", got)
	}
}
