package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// maxLine is the longest text of one log line; longer ones are split, and all but the last piece tagged P. The
// kubelet reads lines of this length at most.
const maxLine = 16 << 10

// flushSize is how much formatted text is written at a time: a chunk of lines of 100 bytes by one write(2). It bounds
// the text in memory: a chunk of empty lines grows forty times.
const flushSize = 96 << 10

// lineBuffers are shared by all formatters, like the chunks that they format: a container that is quiet holds none.
var lineBuffers = sync.Pool{New: func() any { b := make([]byte, 0, flushSize+maxLine+128); return &b }}

// logFile is a container's log: lines of whole chunks go in by one write(2) each. It is safe for use by several
// goroutines.
type logFile struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	file    *os.File
	dropped int64 // bytes lost since the last write that worked
	torn    bool  // the file ends inside a line
}

// openLogFile opens the log at path, below dir; "" gives nil, which drops everything.
func openLogFile(dir, path string, log *slog.Logger) (*logFile, error) {
	if path == "" {
		return nil, nil
	}
	f, err := openLog(dir, path)
	if err != nil {
		return nil, err
	}
	return &logFile{path: path, log: log, file: f}, nil
}

// write appends formatted lines. A log that cannot be written must not stop the container: the lines are dropped,
// the keeper's own log says so once, and says how many bytes when the log can be written again.
func (l *logFile) write(lines []byte) {
	if l == nil || len(lines) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	if l.torn {
		lines = append([]byte{'\n'}, lines...)
	}
	n, err := l.file.Write(lines)
	if err != nil {
		if l.dropped == 0 {
			l.log.Error("container log cannot be written: its lines are dropped", "path", l.path, "error", err)
		}
		l.dropped += int64(len(lines) - n)
		l.torn = n > 0 && lines[n-1] != '\n' || n == 0 && l.torn
		return
	}
	l.torn = false
	if l.dropped > 0 {
		l.log.Warn("container log can be written again", "path", l.path, "dropped_bytes", l.dropped)
		l.dropped = 0
	}
}

// reopen goes on in a new file at the same path, which is below dir, for a caller who has renamed the old one. Lines are
// written whole and under the lock, so none is lost, split or doubled. On an error they go on into the old file.
func (l *logFile) reopen(dir string) error {
	if l == nil {
		return nil
	}
	f, err := openLog(dir, l.path)
	if err != nil {
		return fmt.Errorf("%w; lines go on into the file of before", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return errors.Join(errors.New("reopen container log: it is closed"), f.Close())
	}
	old := l.file
	l.file, l.torn = f, false
	return old.Close()
}

func (l *logFile) close() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	if l.dropped > 0 {
		l.log.Warn("container log lost its last lines", "path", l.path, "dropped_bytes", l.dropped)
	}
	if err := l.file.Close(); err != nil {
		l.log.Error("close container log", "path", l.path, "error", err)
	}
	l.file = nil
}

// formatter cuts one stream of bytes into lines of the CRI log format:
//
//	2016-10-06T00:17:09.669794202Z stdout P log content 1
//	2016-10-06T00:17:09.669794203Z stderr F log content
//
// F is a line that ended, P a piece of one that goes on or that ended without a newline.
type formatter struct {
	stream  string
	flush   func(lines []byte)
	pending []byte  // a line that has not ended, at most maxLine
	head    []byte  // what stands before the text of a line that has ended: time, stream and tag
	out     *[]byte // the lines so far, while a chunk is formatted; else nil
}

// feed formats chunk, which was read at now, and flushes the lines that it completes. Lines of one chunk have one time:
// they were written before it was read, and stay in order.
func (f *formatter) feed(now time.Time, chunk []byte) {
	f.begin(now)
	for len(chunk) > 0 {
		end := bytes.IndexByte(chunk, '\n')
		if end >= 0 && end <= maxLine && len(f.pending) == 0 {
			// Nearly every line: two copies, the newline with the text.
			f.append(f.head, chunk[:end+1])
			chunk = chunk[end+1:]
			continue
		}
		text := chunk
		if end >= 0 {
			text = chunk[:end]
		}
		for len(f.pending)+len(text) > maxLine {
			n := maxLine - len(f.pending)
			f.emit('P', text[:n])
			text = text[n:]
		}
		if end < 0 {
			f.pending = append(f.pending, text...)
			break
		}
		f.emit('F', text)
		chunk = chunk[end+1:]
	}
	f.end()
}

// finish formats what the stream left without a newline.
func (f *formatter) finish(now time.Time) {
	if len(f.pending) == 0 {
		return
	}
	f.begin(now)
	f.emit('P', nil)
	f.end()
}

// begin makes the head of the lines that were read at now.
func (f *formatter) begin(now time.Time) {
	f.out = lineBuffers.Get().(*[]byte)
	f.head = now.UTC().AppendFormat(f.head[:0], time.RFC3339Nano)
	f.head = append(f.head, ' ')
	f.head = append(f.head, f.stream...)
	f.head = append(f.head, " F "...)
}

func (f *formatter) emit(tag byte, text []byte) {
	at := len(f.head) - len("F ")
	f.head[at] = tag
	f.append(f.head, f.pending)
	f.head[at] = 'F'
	f.append(text, []byte{'\n'})
	f.pending = f.pending[:0]
}

// append adds to the lines, which end with b where it ends with a newline, and hands them over where they are enough.
func (f *formatter) append(a, b []byte) {
	out := append(append(*f.out, a...), b...)
	if len(out) >= flushSize && out[len(out)-1] == '\n' {
		f.flush(out)
		out = out[:0]
	}
	*f.out = out
}

// end hands the lines over and keeps only small buffers: there are two formatters a container.
func (f *formatter) end() {
	if len(*f.out) > 0 {
		f.flush(*f.out)
	}
	*f.out = (*f.out)[:0]
	lineBuffers.Put(f.out)
	f.out = nil
	if len(f.pending) == 0 && cap(f.pending) > 1<<10 {
		f.pending = nil
	}
}
