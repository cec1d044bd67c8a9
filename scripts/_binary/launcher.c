/* The binary's first program. It carries a folder with pdctl and a Python, unpacks it once per version into a private
   folder, and executes the pdctl in there. Later starts compare the folder with the list of files and execute it.

   build.py appends to this program: the files (one zlib stream), their list (lines of "MODE SIZE CRC32 PATH"), and a
   trailer. Users can choose the folder: PDCTL_UNPACK. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <ftw.h>
#include <zlib.h>

#define MAGIC "pdctl-binary-01\n"
/* Every file gets this time: one that was changed in place has another. 2000-01-01, in seconds. */
#define FILE_TIME 946684800
#define LOCK_WAIT_S 60
#define MAX_FILES 4096
#define CHUNK 65536

struct trailer {
    uint64_t stream_at, stream_size, list_at, list_size;
    char key[64]; /* VERSION-DIGEST: the name of the folder */
    char magic[16];
};

struct file {
    unsigned mode;
    unsigned long size, crc;
    char *path;
};

static struct trailer trailer;
static struct file files[MAX_FILES];
static int file_count;
static int own = -1; /* this program, open for reading */
static char problems[4096];

static void fail(const char *what) {
    fprintf(stderr, "error: %s\n", what);
    exit(2);
}

/* Remembers why a place cannot be used; shown if none can. */
static void note(const char *place, const char *why) {
    size_t used = strlen(problems);
    snprintf(problems + used, sizeof problems - used, "  %s: %s\n", place, why);
}

static char *format(const char *shape, ...) {
    char *made;
    va_list words;
    va_start(words, shape);
    if (vasprintf(&made, shape, words) < 0) fail("out of memory");
    va_end(words);
    return made;
}

/* -- what this program carries ------------------------------------------------------------------------- */

static void read_at(void *to, size_t size, uint64_t offset) {
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(own, (char *)to + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) fail("this file is damaged or incomplete: copy it again");
        done += (size_t)got;
    }
}

static void read_list(void) {
    struct stat about;
    own = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (own < 0 || fstat(own, &about) < 0) fail("/proc/self/exe cannot be read: mount /proc");
    if (about.st_size < (off_t)sizeof trailer) fail("this file is damaged or incomplete: copy it again");
    read_at(&trailer, sizeof trailer, (uint64_t)about.st_size - sizeof trailer);
    if (memcmp(trailer.magic, MAGIC, sizeof trailer.magic) != 0 || trailer.list_size > 1 << 20 ||
        memchr(trailer.key, 0, sizeof trailer.key) == NULL)
        fail("this file is damaged or incomplete: copy it again");
    char *text = malloc(trailer.list_size + 1);
    if (text == NULL) fail("out of memory");
    read_at(text, trailer.list_size, trailer.list_at);
    text[trailer.list_size] = 0;
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        struct file *file = &files[file_count];
        int path_at = 0;
        if (file_count == MAX_FILES || sscanf(line, "%o %lu %lx %n", &file->mode, &file->size, &file->crc, &path_at) < 3)
            fail("this file is damaged or incomplete: copy it again");
        file->path = line + path_at;
        file_count++;
    }
}

/* -- is it there? -------------------------------------------------------------------------------------- */

/* Nobody else can write to it. Root may have prepared it for all users. */
static int is_private(const struct stat *about) {
    return (about->st_uid == geteuid() || about->st_uid == 0) && (about->st_mode & 022) == 0;
}

static int is_whole(const char *tree) {
    struct stat about;
    if (lstat(tree, &about) < 0 || !S_ISDIR(about.st_mode) || !is_private(&about)) return 0;
    int folder = open(tree, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return 0;
    int whole = 1;
    for (int n = 0; n < file_count && whole; n++)
        whole = fstatat(folder, files[n].path, &about, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(about.st_mode) &&
                is_private(&about) && (unsigned long)about.st_size == files[n].size && about.st_mtime == FILE_TIME;
    close(folder);
    return whole;
}

static void run_if_whole(const char *tree, char **argv) {
    if (!is_whole(tree)) return;
    argv[0] = format("%s/pdctl", tree);
    execv(argv[0], argv);
    note(tree, strerror(errno));
}

/* -- unpack -------------------------------------------------------------------------------------------- */

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *at) {
    (void)about, (void)kind, (void)at;
    remove(path);
    return 0;
}

static void remove_tree(const char *path) { nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

/* Makes the folders above the file. Returns 0, or -1 with errno. */
static int make_folders(char *path, size_t from) {
    for (char *slash = strchr(path + from, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int made = mkdir(path, 0755);
        *slash = '/';
        if (made < 0 && errno != EEXIST) return -1;
    }
    return 0;
}

struct source {
    z_stream stream;
    uint64_t at, left;
    unsigned char in[CHUNK];
};

/* The next bytes of the stream of files. */
static size_t inflate_some(struct source *source, unsigned char *to, size_t size) {
    source->stream.next_out = to;
    source->stream.avail_out = (uInt)size;
    while (source->stream.avail_out > 0) {
        if (source->stream.avail_in == 0 && source->left > 0) {
            size_t some = source->left < CHUNK ? source->left : CHUNK;
            read_at(source->in, some, source->at);
            source->at += some;
            source->left -= some;
            source->stream.next_in = source->in;
            source->stream.avail_in = (uInt)some;
        }
        int code = inflate(&source->stream, Z_NO_FLUSH);
        if (code == Z_STREAM_END) break;
        if (code != Z_OK) fail("this file is damaged or incomplete: copy it again");
    }
    return size - source->stream.avail_out;
}

static int write_all(int to, const unsigned char *bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t put = write(to, bytes + done, size - done);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return -1;
        done += (size_t)put;
    }
    return 0;
}

/* Writes one file. Returns 0, or -1 with errno. */
static int unpack_file(struct source *source, const struct file *file, char *path, size_t root) {
    static unsigned char bytes[CHUNK];
    static const struct timespec times[2] = {{FILE_TIME, 0}, {FILE_TIME, 0}};
    if (make_folders(path, root) < 0) return -1;
    int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, file->mode & 0755);
    if (to < 0) return -1;
    unsigned long crc = crc32(0, NULL, 0);
    for (unsigned long left = file->size; left > 0;) {
        size_t wanted = left < CHUNK ? left : CHUNK;
        if (inflate_some(source, bytes, wanted) != wanted) fail("this file is damaged or incomplete: copy it again");
        crc = crc32(crc, bytes, (uInt)wanted);
        if (write_all(to, bytes, wanted) < 0) { int why = errno; close(to); errno = why; return -1; }
        left -= wanted;
    }
    if (crc != file->crc) fail("this file is damaged: the checksum of a part is wrong; copy it again");
    int done = futimens(to, times);
    return close(to) < 0 ? -1 : done;
}

/* Unpacks everything into this new folder. Returns 0, or -1 with errno. */
static int unpack(const char *folder) {
    static struct source source;
    source.at = trailer.stream_at;
    source.left = trailer.stream_size;
    if (inflateInit(&source.stream) != Z_OK) fail("out of memory");
    int result = 0;
    for (int n = 0; n < file_count && result == 0; n++) {
        char *path = format("%s/%s", folder, files[n].path);
        result = unpack_file(&source, &files[n], path, strlen(folder) + 1);
        free(path);
    }
    inflateEnd(&source.stream);
    return result;
}

/* -- places -------------------------------------------------------------------------------------------- */

/* Makes the private folder for versions. Returns whether it can be used. */
static int prepare(const char *root) {
    struct stat about;
    struct statvfs mount;
    char *path = format("%s/", root);
    int made = make_folders(path, 1);
    free(path);
    if (made < 0 || lstat(root, &about) < 0) return note(root, strerror(errno)), 0;
    if (!S_ISDIR(about.st_mode) || !is_private(&about)) return note(root, "others can write to it"), 0;
    if (statvfs(root, &mount) == 0 && (mount.f_flag & ST_NOEXEC)) return note(root, "mounted noexec"), 0;
    return 1;
}

/* Removes what killed unpackers left. */
static void remove_left(const char *root) {
    DIR *folder = opendir(root);
    if (folder == NULL) return;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (strncmp(entry->d_name, ".new-", 5) != 0 && strncmp(entry->d_name, ".old-", 5) != 0) continue;
        char *path = format("%s/%s", root, entry->d_name);
        remove_tree(path);
        free(path);
    }
    closedir(folder);
}

/* One process unpacks, others wait for it. After a minute it may be stuck: unpacking twice is harmless. */
static int lock_of(const char *root) {
    char *path = format("%s/lock", root);
    int lock = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    free(path);
    struct timespec start, now, pause = {0, 20 * 1000 * 1000};
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (now = start; lock >= 0 && now.tv_sec - start.tv_sec < LOCK_WAIT_S; clock_gettime(CLOCK_MONOTONIC, &now)) {
        if (flock(lock, LOCK_EX | LOCK_NB) == 0) {
            remove_left(root);
            break;
        }
        if (errno != EWOULDBLOCK) break;
        nanosleep(&pause, NULL);
    }
    return lock;
}

/* Unpacks beside the tree and renames: the tree is whole or not there. */
static void replace_tree(const char *root, const char *tree) {
    char *fresh = format("%s/.new-XXXXXX", root), *old = format("%s/.old-XXXXXX", root);
    if (mkdtemp(fresh) == NULL) { note(root, strerror(errno)); return; }
    if (unpack(fresh) < 0 || chmod(fresh, 0755) < 0) {
        note(root, strerror(errno));
        remove_tree(fresh);
        return;
    }
    struct stat about;
    /* A tree that lacks files: processes may still run from it, so it is moved away before it is removed. */
    if (lstat(tree, &about) == 0 && mkdtemp(old) != NULL) {
        if (rename(tree, old) < 0) note(tree, strerror(errno));
        remove_tree(old);
    }
    if (rename(fresh, tree) < 0) {
        note(tree, strerror(errno));
        remove_tree(fresh);
    }
}

/* Executes pdctl from this place, unpacked if need be. Returns if that is not possible. */
static void try_place(char *root, char **argv) {
    if (root == NULL) return;
    char *tree = format("%s/%s", root, trailer.key);
    run_if_whole(tree, argv);
    if (!prepare(root)) return;
    int lock = lock_of(root);
    if (!is_whole(tree)) replace_tree(root, tree);
    if (lock >= 0) close(lock);
    run_if_whole(tree, argv);
}

static char *under(const char *variable, const char *shape) {
    const char *value = getenv(variable);
    return value != NULL && value[0] == '/' ? format(shape, value) : NULL;
}

int main(int argc, char **argv) {
    if (argc < 1) return 2;
    read_list();
    char *self = realpath("/proc/self/exe", NULL);
    if (self != NULL) setenv("PDCTL_BINARY", self, 1);
    const char *chosen = getenv("PDCTL_UNPACK");
    if (chosen != NULL && chosen[0] != 0) {
        try_place(chosen[0] == '/' ? format("%s", chosen) : format("%s/%s", get_current_dir_name(), chosen), argv);
    } else {
        const struct passwd *user;
        char *home = under("HOME", "%s/.cache/pdctl/binary");
        if (home == NULL && (user = getpwuid(geteuid())) != NULL) home = format("%s/.cache/pdctl/binary", user->pw_dir);
        try_place(under("PDCTL_CACHE", "%s/binary"), argv);
        try_place(under("XDG_CACHE_HOME", "%s/pdctl/binary"), argv);
        try_place(home, argv);
        try_place(format("/var/tmp/pdctl-binary-%u", geteuid()), argv);
        try_place(format("/tmp/pdctl-binary-%u", geteuid()), argv);
        try_place(format("/dev/shm/pdctl-binary-%u", geteuid()), argv);
    }
    fprintf(stderr, "error: there is no place where pdctl can be unpacked:\n%s", problems);
    fprintf(stderr, "hint: set PDCTL_UNPACK to a folder of yours that is not mounted noexec, with 60 MB of space\n");
    return 2;
}
