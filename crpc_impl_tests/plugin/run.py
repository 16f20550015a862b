#!/usr/bin/python3
"""Tests of protoc-gen-crpc. Needs protoc, nanopb, a C compiler; runs from any directory and beside
itself.

    run.py [--keep] [--update-golden] [name ...]

A name selects the tests whose id contains it. --keep leaves the generated files under build/.
--update-golden rewrites golden/ from what is generated now: read the difference before committing.
The last line is "N passed, N failed"; tests that cannot run here are counted apart.
"""

# It compiles some 200 files: crpc-test-timeout: 1200

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PLUGIN = os.path.join(ROOT, 'protoc-gen-crpc')
PROTOS = os.path.join(HERE, 'protos')
GOLDEN = os.path.join(HERE, 'golden')
GOOGLE = ['google/protobuf/timestamp.proto', 'google/protobuf/empty.proto']

WARNINGS = ['-Wall', '-Wextra', '-Wpedantic', '-Wconversion', '-Wshadow', '-Werror']
C_WARNINGS = ['-Wstrict-prototypes', '-Wmissing-prototypes']
COMPILERS = [[cc, '-x', 'c', '-std=c99'] + WARNINGS + C_WARNINGS for cc in ('gcc', 'clang')] + [
    [cxx, '-x', 'c++', '-std=c++17'] + WARNINGS for cxx in ('g++', 'clang++')]
COMPILERS = [c for c in COMPILERS if shutil.which(c[0])]

KEEP = False
UPDATE = False


# ---------------------------------------------------------------------------------------------
# running things
# ---------------------------------------------------------------------------------------------

def run(command, cwd=None, data=None):
    return subprocess.run(command, cwd=cwd, input=data, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False)


def nanopb_protos():
    """The directory of nanopb.proto."""
    return run([PLUGIN, '--nanopb-proto']).stdout.decode().strip()


def read(*path):
    with open(os.path.join(*path), encoding='utf-8') as file:
        return file.read()


def write(text, *path):
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(text)


def tree(directory):
    """All files below a directory: {relative path: text}."""
    found = {}
    for where, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(where, name)
            found[os.path.relpath(path, directory)] = read(path)
    return found


class Case(unittest.TestCase):
    """A test with a directory of its own under build/."""

    maxDiff = None

    def setUp(self):
        build = os.path.join(ROOT, 'build')
        os.makedirs(build, exist_ok=True)
        self.dir = tempfile.mkdtemp(prefix='plugin-', dir=build)
        if not KEEP:
            self.addCleanup(shutil.rmtree, self.dir)

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def protoc(self, files, out='out', options=(), include=(PROTOS,), cwd=None, nanopb=True):
        """Runs protoc with nanopb's plugin and ours, both with the same options."""
        os.makedirs(self.path(out), exist_ok=True)
        command = ['protoc', '--plugin=protoc-gen-crpc=' + PLUGIN]
        command += ['-I' + path for path in include]
        for option in ['-I' + path for path in include] + ['-q'] + list(options):
            command += ['--nanopb_opt=' + option] if nanopb else []
            command += ['--crpc_opt=' + option]
        command += ['--nanopb_out=' + self.path(out)] if nanopb else []
        command += ['--crpc_out=' + self.path(out)]
        return run(command + list(files), cwd=cwd or self.dir)

    def generate(self, files, **arguments):
        result = self.protoc(files, **arguments)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return tree(self.path(arguments.get('out', 'out')))

    def compile_all(self, sources, out='out', flags=()):
        """Compiles each source with each compiler, warnings being errors."""
        jobs = []
        for compiler in COMPILERS:
            for source in sources:
                jobs.append(compiler + ['-I' + self.path(out), '-I' + ROOT] + list(flags) + [
                    '-c', source, '-o', '/dev/null'])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for job, result in zip(jobs, pool.map(lambda j: run(j, self.path(out)), jobs)):
                self.assertEqual(result.returncode, 0,
                                 '%s\n%s' % (' '.join(job), result.stderr.decode()))

    def build(self, name, sources, flags=(), out='out'):
        command = ['gcc', '-std=gnu99', '-g', '-Wall', '-Wextra', '-Werror', '-I' + self.path(out),
                   '-I' + ROOT, '-o', name] + list(sources) + list(flags)
        result = run(command, self.path(out))
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return self.path(out, name)


# ---------------------------------------------------------------------------------------------
# what is generated
# ---------------------------------------------------------------------------------------------

class Generate(Case):

    USER = ['user.proto', 'common/types.proto', 'common/deep.proto'] + GOOGLE

    def test_golden(self):
        files = self.generate(['user.proto'])
        for name in ('user.crpc.h', 'user.crpc.c'):
            if UPDATE:
                write(files[name], GOLDEN, name)
            self.assertMultiLineEqual(read(GOLDEN, name), files[name])

    def test_compiles(self):
        files = self.generate(self.USER + ['http.proto', 'views.proto'])
        self.compile_all(sorted(name for name in files if name.endswith('.c')))

    def test_header_alone(self):
        self.generate(self.USER)
        write('#include "user.crpc.h"\n#include "user.crpc.h"\n', self.path('out/twice.c'))
        write('#include <stdio.h>\n#include "common/types.crpc.h"\n#include "user.crpc.h"\n',
              self.path('out/both.c'))
        self.compile_all(['twice.c', 'both.c'])

    def test_zero_of_views(self):
        """However nanopb initialises views, a program that does so compiles without a warning."""
        self.generate(['views.proto', 'common/types.proto', 'common/deep.proto'])
        write('#include "views.crpc.h"\nint zero(void);\nint zero(void)\n{\n'
              '    const demo_Sample sample = demo_Sample_init_zero;\n'
              '    return crpc_view_size(sample.token) == 0;\n}\n', self.path('out/zero.c'))
        self.compile_all(['zero.c'])

    def test_toggles(self):
        self.generate(self.USER)
        for client in '01':
            for server in '01':
                self.compile_all(['user.crpc.c', 'common/types.crpc.c'],
                                 flags=['-DCRPC_ENABLE_CLIENT=' + client,
                                        '-DCRPC_ENABLE_SERVER=' + server])

    def test_toggles_remove_code(self):
        self.generate(self.USER)
        self.assertEqual(self.symbols(['-DCRPC_ENABLE_CLIENT=0', '-DCRPC_ENABLE_SERVER=0']), {
            'R demo_UserService', 'R demo_Empty', 'R demo_UserService_methods',
            'U demo_LoginRequest_msg', 'U demo_LoginResponse_msg',
            'U demo_LoginResponse_Session_msg', 'U common_Account_msg', 'U common_Money_msg',
            'U common_very_deep_DetailedAnswer_msg', 'U google_protobuf_Empty_msg'})
        self.assertTrue(any('_serve' in s for s in self.symbols(['-DCRPC_ENABLE_CLIENT=0'])))
        self.assertFalse(any('_serve' in s for s in self.symbols(['-DCRPC_ENABLE_SERVER=0'])))

    def symbols(self, flags):
        """"<type> <name>" of every symbol of user.crpc.c; none may be writable data."""
        result = run(['gcc', '-std=c99', '-O1', '-fno-pie', '-I.', '-I' + ROOT, '-c',
                      'user.crpc.c', '-o', 'user.o'] + flags, self.path('out'))
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        lines = run(['nm', 'user.o'], self.path('out')).stdout.decode().splitlines()
        found = {' '.join(line.split()[-2:]) for line in lines}
        self.assertFalse([s for s in found if s[0] in 'bBdDC'])
        return found

    def test_static_unit(self):
        """With CRPC_STATIC everything is in one file: generated code included as it is."""
        self.generate(['views.proto', 'common/types.proto', 'common/deep.proto'])
        write('#define CRPC_STATIC\n#include "views.pb.c"\n#include "common/types.pb.c"\n'
              '#include "views.crpc.c"\n#include "common/types.crpc.c"\n', self.path('out/unit.c'))
        for compiler in COMPILERS:  # crpc's functions stay undefined here: some compilers warn
            result = run([compiler[0]] + (['-x', 'c++'] if '++' in compiler[0] else []) + [
                '-w', '-I.', '-I' + ROOT, '-fsyntax-only', 'unit.c'], self.path('out'))
            self.assertEqual(result.returncode, 0, result.stderr.decode())

    def test_nothing_without_services(self):
        files = self.generate(['nothing.proto', 'common/deep.proto'])
        self.assertFalse([name for name in files if 'crpc' in name])

    def test_imported_services_are_not_repeated(self):
        files = self.generate(['user.proto'])
        self.assertEqual(sorted(n for n in files if 'crpc' in n), ['user.crpc.c', 'user.crpc.h'])
        self.assertNotIn('common_Bank', files['user.crpc.h'] + files['user.crpc.c'])

    def test_http_options_and_extension(self):
        files = self.generate(['http.proto'])
        self.assertIn('int Messaging_GetMessage(crpc_channel *channel,', files['http.crpc.h'])
        self.assertIn('{"Messaging", "GetMessage",', files['http.crpc.c'])
        self.compile_all(['http.pb.c', 'http.crpc.c'])

    def test_options_inside_the_proto(self):
        files = self.generate(['inline.proto'], include=(PROTOS, nanopb_protos()))
        for line in ('crpc_view body;', 'crpc_views tags;', 'char title[64];'):
            self.assertIn(line, files['inline.pb.h'])
        self.compile_all(['inline.pb.c', 'inline.crpc.c'])

    def test_service_timeout_reaches_its_methods(self):
        write('syntax = "proto3";\npackage p;\nmessage M {}\n'
              '/* All of them.\n * @timeout_ms 70\n */\nservice S {\n'
              '  rpc A(M) returns (M);\n'
              '  rpc B(M) returns (M);  // @timeout_ms 9\n}\n', self.path('t.proto'))
        code = self.generate(['t.proto'], include=[self.dir])
        self.assertIn('p_S_A_serve, 0, 70}', code['t.crpc.c'])
        self.assertIn('p_S_B_serve, 0, 9}', code['t.crpc.c'])
        self.assertNotIn('@timeout', code['t.crpc.h'])
        self.assertIn(' * All of them. */', code['t.crpc.h'])

    def test_comments_cannot_escape(self):
        lines = ['ends */ here', 'opens /* there', 'splice \\', '/ at the start', '??/', '/*/', '*',
                 'trailing \\', 'quotes " \' and \u00fcml\u00e4ut', '\u202ehidden\u202c', '//']
        write('syntax = "proto3";\npackage p;\nmessage M {}\nservice S {\n'
              + ''.join('// %s\n' % line for line in lines)
              + 'rpc A(M) returns (M);\n/**/ rpc B(M) returns (M); // \n'
              + '/** a */ rpc C(M) returns (M);\n/* // */\nrpc D(M) returns (M);\n}\n',
              self.path('t.proto'))
        files = self.generate(['t.proto'], include=[self.dir])
        self.assertNotIn('\u202e', files['t.crpc.h'])
        self.compile_all(['t.crpc.c'])


class Names(Case):
    """Names always equal nanopb's, because they are nanopb's: whatever the parameters, the code
    compiles against nanopb's header."""

    def check(self, *options, files=('style.proto',), settings='', suffix=('.h', '.c')):
        out = 'out'
        shutil.rmtree(self.path(out), ignore_errors=True)
        write(read(PROTOS, 'style.proto'), self.path('style.proto'))
        write(read(PROTOS, 'style.options') + settings, self.path('style.options'))
        found = self.generate(list(files), options=options, include=[self.dir])
        sources = sorted(n for n in found if n.endswith(suffix[1]) and not n.endswith('.h'))
        self.assertEqual(len(sources), 2 * len(files))
        self.compile_all(sources)
        return found['style.crpc' + suffix[0]]

    def test_default(self):
        header = self.check()
        self.assertIn('int acme_devices_SensorHub_Delete(crpc_channel *channel,', header)
        self.assertIn('const acme_devices_Reading_Sample *request', header)

    def test_strip_package(self):
        header = self.check(settings='* mangle_names:M_STRIP_PACKAGE\n')
        self.assertIn('int SensorHub_Delete(crpc_channel *channel,', header)
        self.assertIn('const Reading_Sample *request', header)

    def test_flatten(self):
        header = self.check(settings='* mangle_names:M_FLATTEN\n')
        self.assertIn('const Sample *request', header)

    def test_initials(self):
        header = self.check(settings='* mangle_names:M_PACKAGE_INITIALS\n')
        self.assertIn('int ad_SensorHub_Delete(crpc_channel *channel,', header)

    def test_package(self):
        header = self.check(settings='* package:"other.name"\n')
        self.assertIn('int other_name_SensorHub_Delete(crpc_channel *channel,', header)
        self.assertIn('const other_name_Reading_Sample *request', header)

    def test_setting_as_parameter(self):
        header = self.check('-s mangle_names:M_STRIP_PACKAGE')
        self.assertIn('int SensorHub_Delete(crpc_channel *channel,', header)

    def test_c_style(self):
        header = self.check('-C')
        self.assertIn('int acme_devices_sensor_hub_get_http_status(', header)
        self.assertIn('const acme_devices_reading_sample_t *request', header)
        self.assertIn('} acme_devices_sensor_hub_handlers_t;', header)
        self.assertIn('int (*register_)(crpc_context *context,', header)  # keywords
        self.assertIn('int (*delete_)(crpc_context *context,', header)

    def test_extensions(self):
        header = self.check('-e.nano', '-H.hh', '-S.cpp', suffix=('.hh', '.cpp'))
        self.assertIn('#include "style.nano.hh"', header)

    def test_include_format(self):
        header = self.check('-Qbracket')
        self.assertIn('#include <style.pb.h>', header)

    def test_exclude(self):
        header = self.generate(['user.proto'], options=['-xcommon/deep.proto'])['user.crpc.h']
        self.assertNotIn('common/deep', header)
        self.assertIn('common/types', header)

    def test_options_beside_the_first_file(self):
        """nanopb looks there for the .options of imports, too."""
        write('syntax = "proto3";\nmessage Far { string s = 1; }\n', self.path('sub/far.proto'))
        write('Far.s max_size:8\n', self.path('sub/far.options'))
        write('syntax = "proto3";\nimport "far.proto";\nservice S { rpc A(Far) returns (Far); }\n',
              self.path('sub/t.proto'))
        result = run(['protoc', '--plugin=protoc-gen-crpc=' + PLUGIN, '-I.', '-Isub',
                      '--crpc_out=.', 'sub/t.proto'], self.dir)
        self.assertEqual(result.returncode, 0, result.stderr.decode())

    def test_options_file_of_another_name(self):
        write(read(PROTOS, 'style.proto'), self.path('style.proto'))
        write(read(PROTOS, 'style.options'), self.path('all.opt'))
        self.generate(['style.proto'], options=['-fall.opt'], include=[self.dir])
        self.compile_all(['style.crpc.c', 'style.pb.c'])

    def test_strip_path(self):
        write(read(PROTOS, 'style.proto'), self.path('in/deep/style.proto'))
        write(read(PROTOS, 'style.options'), self.path('in/deep/style.options'))
        found = self.generate(['deep/style.proto'], options=['--strip-path'],
                              include=[self.path('in')])
        self.assertIn('#include "style.pb.h"', found['deep/style.crpc.h'])
        self.assertIn('#include "style.crpc.h"', found['deep/style.crpc.c'])

    def test_space_separated_parameter(self):
        """nanopb's plugin takes "-I a -s b" as well; so does this one."""
        write(read(PROTOS, 'style.proto'), self.path('style.proto'))
        write(read(PROTOS, 'style.options'), self.path('opt/style.options'))
        parameter = '-I opt -s mangle_names=M_STRIP_PACKAGE'
        result = run(['protoc', '--plugin=protoc-gen-crpc=' + PLUGIN, '-I.',
                      '--crpc_out=%s:.' % parameter, 'style.proto'], self.dir)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        self.assertIn(' SensorHub_Delete(', read(self.dir, 'style.crpc.h'))


class Deterministic(Case):

    FILES = ['user.proto', 'http.proto', 'views.proto', 'common/types.proto']

    def test_runs_are_identical(self):
        first = self.generate(self.FILES, out='first')
        elsewhere = self.path('elsewhere')
        os.mkdir(elsewhere)
        for name, files, cwd in (('again', self.FILES, None),
                                 ('reversed', self.FILES[::-1], None),
                                 ('moved', self.FILES, elsewhere),
                                 ('inside', self.FILES, PROTOS)):
            self.assertEqual(first, self.generate(files, out=name, cwd=cwd), name)

    def test_one_by_one(self):
        together = self.generate(self.FILES, out='together')
        for name in self.FILES:
            self.generate([name], out='single')
        self.assertEqual(together, tree(self.path('single')))

    def test_no_paths_no_dates(self):
        for name, text in self.generate(self.FILES).items():
            if 'crpc' in name:
                self.assertNotRegex(text, r'\b20[0-9][0-9]\b|%s|/tmp|/home|/usr'
                                    % re.escape(ROOT), name)

    def test_hash_seed(self):
        outputs = set()
        for seed in '123':
            os.environ['PYTHONHASHSEED'] = seed
            try:
                files = self.generate(['user.proto'], out='seed' + seed)
            finally:
                del os.environ['PYTHONHASHSEED']
            outputs.add(files['user.crpc.h'] + files['user.crpc.c'])
        self.assertEqual(len(outputs), 1)


# ---------------------------------------------------------------------------------------------
# what is refused
# ---------------------------------------------------------------------------------------------

VIEW_FILE = '* include:"crpc.h" callback_function:"crpc_view_field"\n'
HEAD3 = 'syntax = "proto3";\npackage demo;\n'
HEAD2 = 'syntax = "proto2";\npackage demo;\n'
ONE_METHOD = 'message Ack {}\nservice S { rpc Do(M) returns (Ack); }\n'


class Refused(Case):
    """In each .proto below, a comment //! ends the line that is to be named."""

    def refuse(self, proto, options, *expected, others=None, parameters=(), count=None, files=None,
               nanopb=True):
        """Each expected is (subject, what is wrong, remedy), in the order of the //! marks."""
        write(proto, self.path('t.proto'))
        write(options, self.path('t.options'))
        for name, text in (others or {}).items():
            write(text, self.path(name))
        result = self.protoc(files or ['t.proto'], include=[self.dir], options=parameters,
                             nanopb=nanopb)
        text = result.stderr.decode()
        self.assertNotEqual(result.returncode, 0, text)
        self.assertNotIn('Traceback', text)
        self.assertEqual(tree(self.path('out')), {})
        self.check_lines(text, self.marks(proto, others or {}), expected)
        total = count or len(expected)
        self.assertIn('%d problem%s, nothing was generated:' % (total, 's' * (total > 1)), text)
        return text

    @staticmethod
    def marks(proto, others):
        found = []
        for name, text in sorted(dict(others, **{'t.proto': proto}).items()):
            found += ['%s:%d' % (name, number) for number, line in enumerate(text.splitlines(), 1)
                      if line.rstrip().endswith('//!')]
        return found

    def check_lines(self, text, marks, expected):
        self.assertEqual(len(marks), len(expected), 'marks in the test')
        for mark, (subject, what, remedy) in zip(marks, expected):
            start = '%s: %s: ' % (mark, subject)
            lines = [line for line in text.splitlines() if line.startswith(start)]
            self.assertTrue(lines, '%s\nnot in\n%s' % (start, text))
            self.assertTrue([line for line in lines if what in line and remedy in line + '\n'],
                            '%s ... %s\nnot in\n%s' % (what, remedy, '\n'.join(lines)))

    def test_streaming(self):
        self.refuse(HEAD3 + 'message M {}\nservice S {\n'
                    '  rpc Up(stream M) returns (M);  //!\n'
                    '  rpc Down(M) returns (stream M);  //!\n'
                    '  rpc Fine(M) returns (M);\n}\n', '',
                    ('method demo.S.Up', 'streaming', 'remove "stream"'),
                    ('method demo.S.Down', 'streaming', 'remove "stream"'))

    def test_unbounded(self):
        self.refuse(HEAD3 + 'message M {\n'
                    '  string text = 1;  //!\n'
                    '  bytes raw = 2;  //!\n'
                    '  repeated int32 numbers = 3;  //!\n'
                    '  repeated string words = 4;  //!\n'
                    '  repeated M2 parts = 5;  //!\n'
                    '  map<int32, int32> table = 6;  //!\n'
                    '}\nmessage M2 {}\n' + ONE_METHOD, '',
                    ('field demo.M.text', 'has no bound',
                     "write 'demo.M.text max_size:N' in t.options, or callback_datatype:"
                     '"crpc_view"'),
                    ('field demo.M.raw', 'has no bound', "'demo.M.raw max_size:N'"),
                    ('field demo.M.numbers', 'has no bound', "'demo.M.numbers max_count:N'"),
                    ('field demo.M.words', 'has no bound',
                     "'demo.M.words max_size:N max_count:N' in t.options, or callback_datatype:"
                     '"crpc_views"'),
                    ('field demo.M.parts', 'has no bound', "'demo.M.parts max_count:N'"),
                    ('field demo.M.table', 'has no bound', "'demo.M.table max_count:N'"))

    def test_half_bounded(self):
        self.refuse(HEAD3 + 'message M {\n'
                    '  repeated string a = 1;  //!\n'
                    '  repeated string b = 2;  //!\n'
                    '  int32 c = 3;  //!\n}\n' + ONE_METHOD,
                    'demo.M.a max_size:8\ndemo.M.b max_count:8\ndemo.M.c type:FT_CALLBACK\n',
                    ('field demo.M.a', 'has no bound', "'demo.M.a max_count:N'"),
                    ('field demo.M.b', 'has no bound', "'demo.M.b max_size:N'"),
                    ('field demo.M.c', 'has no bound', "'demo.M.c type:FT_STATIC'"))

    def test_reached_through_others(self):
        self.refuse(HEAD3 + 'import "sub/other.proto";\n'
                    'message M { Inner inner = 1; }\n'
                    'message Inner {\n'
                    '  oneof o {\n    sub.Far far = 1;\n    string text = 2;  //!\n  }\n}\n'
                    'message Unreached { string never_mind = 1; }\n' + ONE_METHOD, '',
                    ('field sub.Far.name', 'has no bound',
                     "'sub.Far.name max_size:N' in sub/other.options"),
                    ('field demo.Inner.text', 'has no bound', "'demo.Inner.text max_size:N' in "
                     't.options\n'),  # and no word of a view, which a oneof cannot hold
                    others={'sub/other.proto': 'syntax = "proto3";\npackage sub;\nmessage Far {\n'
                                               '  string name = 1;  //!\n}\n'})

    def test_map_entries(self):
        self.refuse(HEAD3 + 'message M {\n'
                    '  map<string, int32> table = 1;  //!\n}\n' + ONE_METHOD,
                    'demo.M.table max_count:4\n',
                    ('field demo.M.TableEntry.key', 'has no bound',
                     "'demo.M.TableEntry.key max_size:N'"))

    def test_pattern_in_the_remedy_is_nanopb_s(self):
        """.options lines match mangled names: the remedy must name those."""
        self.refuse(HEAD3 + 'message M {\n  string text = 1;  //!\n}\n' + ONE_METHOD,
                    '* mangle_names:M_STRIP_PACKAGE\n',
                    ('field demo.M.text', 'has no bound', "write 'M.text max_size:N'"))

    def test_lost_options_file(self):
        os.makedirs(self.path('protos'))
        write(HEAD3 + 'message M { string text = 1; }\n' + ONE_METHOD, self.path('protos/t.proto'))
        write('demo.M.text max_size:4\n', self.path('protos/t.options'))
        command = ['protoc', '--plugin=protoc-gen-crpc=' + PLUGIN, '-Iprotos', '--crpc_out=.',
                   't.proto']
        result = run(command, self.dir)
        self.assertIn('note: there is no t.options in the current directory or the directories '
                      'given with --nanopb_opt=-IDIR --crpc_opt=-IDIR', result.stderr.decode())
        result = run(command + ['--crpc_opt=-Iprotos'], self.dir)
        self.assertEqual(result.returncode, 0, result.stderr.decode())

    def test_wrong_kind_of_view(self):
        self.refuse(HEAD3 + 'message M {\n'
                    '  repeated string words = 1;  //!\n'
                    '  string word = 2;  //!\n'
                    '  repeated int32 numbers = 3;  //!\n'
                    '  Sub sub = 4;  //!\n'
                    '  bytes mac = 5;  //!\n'
                    '  string fine = 6;\n'
                    '}\nmessage Sub {}\n' + ONE_METHOD,
                    VIEW_FILE + 'demo.M.words callback_datatype:"crpc_view"\n'
                    'demo.M.word callback_datatype:"crpc_views"\n'
                    'demo.M.numbers callback_datatype:"crpc_views"\n'
                    'demo.M.sub callback_datatype:"crpc_view" type:FT_CALLBACK\n'
                    'demo.M.mac callback_datatype:"crpc_view" type:FT_CALLBACK fixed_length:true '
                    'max_size:6\n'
                    'demo.M.fine callback_datatype:"crpc_view"\n',
                    ('field demo.M.words', 'crpc_view is for a singular field',
                     "write 'demo.M.words callback_datatype:\"crpc_views\"' in t.options"),
                    ('field demo.M.word', 'crpc_views is for a repeated field',
                     "write 'demo.M.word callback_datatype:\"crpc_view\"' in t.options"),
                    ('field demo.M.numbers', 'crpc_views is for string and bytes, not for a field '
                     'of type int32', "'demo.M.numbers max_count:N'"),
                    ('field demo.M.sub', 'not for a field of type message',
                     "'demo.M.sub type:FT_STATIC'"),
                    ('field demo.M.mac', 'not for a field of type fixed_length',
                     "'demo.M.mac type:FT_STATIC'"))

    def test_view_in_oneof(self):
        self.refuse(HEAD3 + 'message M {\n  oneof o {\n'
                    '    string text = 1;  //!\n'
                    '    int32 number = 2;\n  }\n}\n' + ONE_METHOD,
                    VIEW_FILE + 'demo.M.text callback_datatype:"crpc_view"\n',
                    ('field demo.M.text', 'a view in a oneof would be lost',
                     "write 'demo.M.text max_size:N' in t.options, or no_unions:true for the oneof "
                     'demo.M.o'))

    def test_groups(self):
        self.refuse('syntax = "proto2";\npackage demo;\nmessage M {\n'
                    '  optional group Part = 1 {  //!\n    optional int32 n = 1;\n  }\n'
                    '  message Inner {\n'
                    '    repeated group Deep = 2 {  //!\n      optional int32 n = 1;\n    }\n'
                    '  }\n}\nservice S {\n  rpc Do(M) returns (M);\n}\n', '',
                    ('demo.M.part', 'groups are not supported', 'make it a message'),
                    ('demo.M.Inner.deep', 'groups are not supported', 'make it a message'),
                    nanopb=False)  # which ends with a traceback

    def test_oneof_without_union_is_fine(self):
        write(HEAD3 + 'message M {\n  oneof o {\n    string text = 1;\n    int32 number = 2;\n'
              '  }\n}\n' + ONE_METHOD, self.path('t.proto'))
        write(VIEW_FILE + 'demo.M.o no_unions:true\ndemo.M.text callback_datatype:"crpc_view"\n',
              self.path('t.options'))
        files = self.generate(['t.proto'], include=[self.dir])
        self.assertIn('crpc_view text;', files['t.pb.h'])
        self.compile_all(['t.pb.c', 't.crpc.c'])

    def test_view_beside_bare_callback(self):
        self.refuse(HEAD3 + 'message M {\n'
                    '  string view = 1;\n'
                    '  string bare = 2;  //!\n'
                    '  bytes odd = 3;  //!\n}\n' + ONE_METHOD,
                    VIEW_FILE + 'demo.M.view callback_datatype:"crpc_view"\n'
                    'demo.M.odd callback_datatype:"my_type"\n',
                    ('field demo.M.bare', 'has no bound, so nanopb makes it a callback, which '
                     'crpc_view_field would take for a view', "'demo.M.bare max_size:N'"),
                    ('field demo.M.odd', 'its type my_type is unknown to crpc_view_field',
                     'give it to a message with a callback_function of its own'))

    def test_custom_callback_type_is_the_users_own(self):
        write(HEAD3 + 'message M { bytes odd = 1; }\n' + ONE_METHOD, self.path('t.proto'))
        write('* include:"my.h"\ndemo.M callback_function:"my_function"\n'
              'demo.M.odd callback_datatype:"my_type"\n', self.path('t.options'))
        write('typedef struct { void *a[1]; void *b; } my_type;\n', self.path('out/my.h'))
        self.generate(['t.proto'], include=[self.dir])
        self.compile_all(['t.pb.c', 't.crpc.c'])

    def test_view_without_function_or_include(self):
        text = self.refuse(HEAD3 + 'message M {  //!\n'
                           '  string view = 1;\n}\n' + ONE_METHOD,
                           'demo.M.view callback_datatype:"crpc_view"\n',
                           ('message demo.M', 'has views, but its callback_function is '
                            'demo_M_callback',
                            "write 'demo.M callback_function:\"crpc_view_field\"' in t.options"),
                           count=2)
        self.assertIn('t.proto:3: message demo.M: has views, but t.pb.h would not include crpc.h; '
                      "write '* include:\"crpc.h\"' in t.options", text)

    def test_view_with_another_function(self):
        self.refuse(HEAD3 + 'message M {  //!\n  string view = 1;\n}\n' + ONE_METHOD,
                    '* include:"crpc.h" callback_function:"mine"\n'
                    'demo.M.view callback_datatype:"crpc_view"\n',
                    ('message demo.M', 'its callback_function is mine', 'crpc_view_field'))

    def test_packed_view(self):
        self.refuse(HEAD3 + 'message M {  //!\n  string view = 1;\n}\n' + ONE_METHOD,
                    VIEW_FILE + '* packed_struct:true\n'
                    'demo.M.view callback_datatype:"crpc_view"\n',
                    ('message demo.M', 'packed', 'remove packed_struct'))

    MANY = 'message Many {  //!\n%s  int32 last = 10;\n}\n' % ''.join(
        '  repeated string s%d = %d;\n' % (i, i) for i in range(1, 10))

    def test_many_views(self):
        """nanopb would write a .pb.c that does not compile."""
        proto = HEAD3 + self.MANY + 'message M {\n  Many many = 1;\n}\n' + ONE_METHOD
        options = VIEW_FILE + '*.s? callback_datatype:"crpc_views"\n'
        self.refuse(proto, options,
                    ('message demo.Many', 'has so many views that nanopb picks too small a '
                     'descriptor', "write 'demo.Many descriptorsize:DS_2' in t.options"), count=2)
        write(options + 'demo.M* descriptorsize:DS_2\n', self.path('t.options'))
        self.generate(['t.proto'], include=[self.dir])
        self.compile_all(['t.pb.c', 't.crpc.c'])

    def test_many_views_in_arrays(self):
        proto = HEAD3 + ('message Sub {\n  repeated string s = 1;\n}\n'
                         'message M {  //!\n  repeated Sub subs = 1;\n  int32 last = 2;\n}\n'
                         ) + ONE_METHOD
        options = VIEW_FILE + '*.s callback_datatype:"crpc_views"\ndemo.M.subs max_count:%d\n'
        self.refuse(proto, options % 130,
                    ('message demo.M', 'too small', "'demo.M descriptorsize:DS_4'"))
        passed = 0
        for count in (1, 2, 7, 8, 9, 10, 11, 12, 100, 120, 126, 127, 128):
            write(options % count, self.path('t.options'))
            if self.protoc(['t.proto'], include=[self.dir]).returncode == 0:
                passed += 1  # and then it must compile
                self.build('t.o', ['t.pb.c'], ['-c'])
        self.assertGreater(passed, 5)

    def test_pointer(self):
        self.refuse(HEAD2 + 'message M {\n'
                    '  optional string text = 1;  //!\n'
                    '  optional int32 number = 2;  //!\n'
                    '  repeated Ack acks = 3;  //!\n}\n' + ONE_METHOD,
                    'demo.M.* type:FT_POINTER\n',
                    ('field demo.M.text', 'is a pointer',
                     "remove FT_POINTER and write 'demo.M.text max_size:N'"),
                    ('field demo.M.number', 'is a pointer', "'demo.M.number type:FT_STATIC'"),
                    ('field demo.M.acks', 'is a pointer', "'demo.M.acks max_count:N'"))

    def test_pointer_by_fallback(self):
        self.refuse(HEAD3 + 'message M {\n  string text = 1;  //!\n}\n' + ONE_METHOD, '',
                    ('field demo.M.text', 'is a pointer', "'demo.M.text max_size:N'"),
                    parameters=['-s fallback_type:FT_POINTER'])

    def test_option_with_a_large_number(self):
        """Without its line in http.options the file would not compile after nanopb."""
        proto = read(PROTOS, 'http.proto').replace('http = 72295730;', 'http = 72295730;  //!')
        self.refuse(proto, re.sub('http .*', '', read(PROTOS, 'http.options')),
                    ('option http', 'its number 72295730 does not fit nanopb',
                     "write 'http type:FT_IGNORE' in t.options"))

    def test_extension_range(self):
        self.refuse(HEAD2 + 'message M {  //!\n'
                    '  extensions 100 to 200;\n}\n' + ONE_METHOD, '',
                    ('field demo.M.extensions', 'extensions',
                     "write 'demo.M.extensions type:FT_IGNORE' in t.options"))

    def test_submessage_callback(self):
        self.refuse(HEAD3 + 'message M {\n  oneof o {\n'
                    '    Ack ack = 1;  //!\n  }\n}\n' + ONE_METHOD,
                    'demo.M.ack submsg_callback:true\n',
                    ('field demo.M.ack', 'submsg_callback', 'remove submsg_callback'))

    def test_skipped_message(self):
        self.refuse(HEAD3 + 'message M {  //!\n}\n' + ONE_METHOD, 'demo.M skip_message:true\n',
                    ('message demo.M', 'nanopb skips it', 'remove skip_message'))

    def test_recursion(self):
        self.refuse(HEAD3 + 'message M {\n  Node root = 1;\n}\n'
                    'message Node {\n  Leaf leaf = 1;\n}\n'
                    'message Leaf {\n  Node parent = 1;  //!\n}\n' + ONE_METHOD, '',
                    ('field demo.Leaf.parent', 'makes demo.Node contain itself',
                     "write 'demo.Leaf.parent type:FT_IGNORE' in t.options"))

    def test_recursion_by_a_list(self):
        self.refuse(HEAD3 + 'message M {\n  repeated M children = 1;  //!\n}\n' + ONE_METHOD, '',
                    ('field demo.M.children', 'makes demo.M contain itself',
                     "write 'demo.M.children type:FT_IGNORE' in t.options"))

    def test_ignored_fields_are_fine(self):
        write(HEAD2 + 'message M {\n  optional string a = 1;\n  optional M m = 2;\n'
              '  extensions 10 to 20;\n}\n' + ONE_METHOD, self.path('t.proto'))
        write('demo.M.* type:FT_IGNORE\n', self.path('t.options'))
        self.generate(['t.proto'], include=[self.dir])
        self.compile_all(['t.pb.c', 't.crpc.c'])

    def test_timeouts(self):
        remedy = 'write "@timeout_ms N" with N from 1 to 86400000'
        cases = ['@timeout_ms', '@timeout_ms abc', '@timeout_ms 0', '@timeout_ms -1',
                 '@timeout_ms 86400001', '@timeout_ms 5 s', '@timeout_ms: 5', '@timeout 5',
                 '@timeout_ms=5', '@timeout_ms 99999999999999999999', '@timeout_ms 0x10']
        methods = ''.join('  // %s\n  rpc M%d(M) returns (M);  //!\n' % (text, i)
                          for i, text in enumerate(cases))
        self.refuse(HEAD3 + 'message M {}\nservice S {\n' + methods + '}\n', '',
                    *[('method demo.S.M%d' % i, 'cannot read "%s"' % text, remedy)
                      for i, text in enumerate(cases)])

    def test_timeout_limits_are_fine(self):
        write(HEAD3 + 'message M {}\nservice S {\n  // @timeout_ms 1\n  rpc A(M) returns (M);\n'
              '  // @timeout_ms   86400000  \n  rpc B(M) returns (M);\n}\n', self.path('t.proto'))
        code = self.generate(['t.proto'], include=[self.dir])['t.crpc.c']
        self.assertIn('0, 1}', code)
        self.assertIn('0, 86400000}', code)

    def test_timeout_twice_and_on_service(self):
        self.refuse(HEAD3 + 'message M {}\n// @timeout_ms never\nservice S {  //!\n'
                    '  // @timeout_ms 5\n  // @timeout_ms 6\n'
                    '  rpc A(M) returns (M);  //!\n}\n', '',
                    ('service demo.S', 'cannot read "@timeout_ms never"', '"@timeout_ms N"'),
                    ('method demo.S.A', 'has 2 @timeout_ms lines', 'leave one'))

    def test_generated_names_collide(self):
        self.refuse(HEAD3 + 'message M {}\nservice S {\n'
                    '  rpc Login(M) returns (M);\n'
                    '  rpc Login_async(M) returns (M);  //!\n'
                    '  rpc handlers(M) returns (M);  //!\n'
                    '  rpc methods(M) returns (M);  //!\n}\n'
                    'service S_Login {  //!\n'
                    '  rpc notify(M) returns (M);  //!\n}\n', '',
                    ('method demo.S.Login_async', 'its C name demo_S_Login_async is also that of '
                     'method demo.S.Login (t.proto:5)', 'rename one of them'),
                    ('method demo.S.handlers', 'demo_S_handlers is also that of service demo.S',
                     'rename'),
                    ('method demo.S.methods', 'demo_S_methods is also that of service demo.S',
                     'rename'),
                    ('service demo.S_Login', 'demo_S_Login is also that of method demo.S.Login',
                     'rename'),
                    ('method demo.S_Login.notify', 'demo_S_Login_notify is also that of method '
                     'demo.S.Login', 'rename'))

    def test_names_collide_with_messages(self):
        self.refuse(HEAD3 + 'message M {}\nmessage S_Login { int32 id = 1; }\nservice S {\n'
                    '  rpc Login(M) returns (M);  //!\n'
                    '  rpc Login_id(M) returns (M);\n'
                    '  rpc Login_id_tag(M) returns (M);  //!\n'
                    '  rpc Login_fields(M) returns (M);  //!\n}\n', '',
                    ('method demo.S.Login', 'its C name demo_S_Login is also that of message '
                     'demo_S_Login in t.proto', 'rename one of them'),
                    ('method demo.S.Login_id_tag', 'field demo_S_Login.id', 'rename'),
                    ('method demo.S.Login_fields', 'message demo_S_Login', 'rename'))

    def test_names_collide_with_the_rest_of_nanopb(self):
        other = ('syntax = "proto2";\npackage demo;\nmessage S_Far {}\n'
                 'message E { extensions 100 to 200; }\n')
        self.refuse(HEAD2 + 'import "other.proto";\nmessage M {}\n'
                    'message S_Do { optional bytes raw = 1; }\n'
                    'enum S_Kind { Go = 0; }\n'
                    'extend E { optional int32 S_ext = 100; }\n'
                    'service S {\n'
                    '  rpc Far(M) returns (M);  //!\n'
                    '  rpc Do_raw_t(M) returns (M);  //!\n'
                    '  rpc Kind_Go(M) returns (M);  //!\n'
                    '  rpc ext(M) returns (M);  //!\n}\n',
                    'demo.S_Do.raw max_size:8\n',
                    ('method demo.S.Far', 'demo_S_Far is also that of message demo_S_Far in '
                     'other.proto', 'rename'),
                    ('method demo.S.Do_raw_t', 'also that of field demo_S_Do.raw', 'rename'),
                    ('method demo.S.Kind_Go', 'also that of enum demo_S_Kind', 'rename'),
                    ('method demo.S.ext', 'also that of extension demo_S_ext', 'rename'),
                    others={'other.proto': other})

    def test_names_collide_with_short_enum_names(self):
        self.refuse(HEAD3 + 'message M {}\nenum Kind { S_Do = 0; }\n'
                    'service S {\n  rpc Do(M) returns (M);  //!\n}\n', '* long_names:false\n',
                    ('method demo.S.Do', 'its C name demo_S_Do is also that of enum demo_Kind',
                     'rename'))

    def test_names_collide_with_nanopb_s_mapping(self):
        """With mangled names nanopb maps the full ones by macros."""
        self.refuse(HEAD3 + 'message Msg {}\nservice demo {\n  rpc Msg(.demo.Msg) '
                    'returns (.demo.Msg);  //!\n}\n', '* mangle_names:M_STRIP_PACKAGE\n',
                    ('method demo.demo.Msg', 'its C name demo_Msg is also that of name demo_Msg',
                     'rename'))

    def test_names_collide_with_an_imported_service(self):
        self.refuse(HEAD3 + 'import "other.proto";\nmessage M {}\n'
                    'service S_Do {  //!\n}\n', '* mangle_names:M_STRIP_PACKAGE\n',
                    ('service demo.S_Do', 'its C name S_Do is also that of method v2.S.Do '
                     '(other.proto:4)', 'rename'),
                    others={'other.proto': 'syntax = "proto3";\npackage v2;\nmessage M2 {}\n'
                                           'service S { rpc Do(M2) returns (M2); }\n',
                            'other.options': '* mangle_names:M_STRIP_PACKAGE\n'})

    def test_names_collide_between_files(self):
        other = ('syntax = "proto3";\npackage v2;\nmessage M2 {}\n'
                 'service S { rpc Do(M2) returns (M2); }\n')
        write(HEAD3 + 'message M {}\nservice S {\n  rpc Do(M) returns (M);\n}\n',
              self.path('t.proto'))
        write(other, self.path('other.proto'))
        result = self.protoc(['t.proto', 'other.proto'], include=[self.dir],
                             options=['-s mangle_names:M_STRIP_PACKAGE'])
        self.assertIn('t.proto:4: service demo.S: its C name S is also that of service v2.S '
                      '(other.proto:4); rename one of them', result.stderr.decode())
        self.generate(['t.proto'], include=[self.dir])  # alone, or with packages, they are fine
        self.generate(['t.proto', 'other.proto'], include=[self.dir])

    def test_c_style_folds_case(self):
        self.refuse(HEAD3 + 'message M {}\nservice S {\n  rpc GetUser(M) returns (M);\n'
                    '  rpc get_user(M) returns (M);  //!\n}\n', '',
                    ('method demo.S.get_user', 'its handler get_user is also that of '
                     'demo.S.GetUser', 'rename one of them'),
                    parameters=['-C'], count=10)

    def test_keywords_and_parameters_as_names(self):
        text = self.refuse('syntax = "proto3";\nmessage request {}\n'
                           'service register {  //!\n'
                           '  rpc A(request) returns (request);\n}\n'
                           'service user {  //!\n}\n', '',
                           ('service register', 'its C name register is also that of a keyword',
                            'rename'),
                           ('service user', 'its C name user is also that of a parameter of '
                            'generated functions', 'rename'), count=3)
        self.assertIn('t.proto: message request in t.proto: "request" is a parameter of generated '
                      'functions; put it into a package, or rename it', text)

    def test_everything_at_once_in_order(self):
        text = self.refuse(HEAD3 + 'message M {\n'
                           '  string b = 2;  //!\n'
                           '  string a = 1;  //!\n}\nmessage Ack {}\n'
                           'service S {\n  rpc Do(M) returns (stream Ack);  //!\n}\n', '',
                           ('field demo.M.b', 'bound', 'max_size'),
                           ('field demo.M.a', 'bound', 'max_size'),
                           ('method demo.S.Do', 'streaming', 'stream'))
        numbers = [int(n) for n in re.findall(r'^t\.proto:(\d+):', text, re.MULTILINE)]
        self.assertEqual(numbers, sorted(numbers))

    def test_unused_messages_are_free(self):
        self.generate(['http.proto'])
        files = self.generate(['user.proto', 'nothing.proto'])
        self.assertIn('nothing.pb.h', files)


class Parameters(Case):

    def refused(self, *options, proto=None, settings=None):
        """What our plugin alone says (nanopb's would exit first)."""
        write(proto or HEAD3 + 'message M {}\n' + ONE_METHOD, self.path('t.proto'))
        if settings is not None:
            write(settings, self.path('t.options'))
        result = run(['protoc', '--plugin=protoc-gen-crpc=' + PLUGIN, '-I.', '--crpc_out=.']
                     + ['--crpc_opt=' + option for option in options] + ['t.proto'], self.dir)
        self.assertNotEqual(result.returncode, 0)
        text = result.stderr.decode()
        self.assertNotIn('Traceback', text)
        return text

    def test_unknown(self):
        self.assertIn('parameter "--colour": no such option: --colour; see protoc-gen-crpc --help',
                      self.refused('--colour'))
        self.assertIn('"lite" is not an option', self.refused('lite'))
        self.assertIn('requires 1 argument', self.refused('-f'))
        self.assertIn('No closing quotation', self.refused('"-s'))

    def test_bad_setting(self):
        self.assertIn('no field named "colour"', self.refused('-s colour:3'))
        self.assertIn('t.proto: nanopb: ParseError', self.refused('-s max_size:many'))

    def test_bad_options_line(self):
        self.assertIn("t.options:2: Unparsable option line: 'demo.M colour:3'",
                      self.refused(settings='# fine\ndemo.M colour:3\n'))
        self.assertIn('t.options:1: Option lines should have space', self.refused(settings='x\n'))

    def test_nanopb_exception(self):
        self.assertIn("t.proto: nanopb: Exception: Field 'a' is defined as static, but max_size",
                      self.refused(proto=HEAD3 + 'message M { string a = 1; }\n' + ONE_METHOD,
                                   settings='demo.M.a type:FT_STATIC\n'))

    def test_missing_options_file(self):
        text = self.refused('-fmissing.options',
                            proto=HEAD3 + 'message M { string a = 1; }\n' + ONE_METHOD)
        self.assertIn('note: there is no missing.options', text)

    def test_by_hand(self):
        result = run([PLUGIN, '--help'])
        self.assertEqual(result.returncode, 0)
        for word in (b'callback_datatype:"crpc_view"', b'@timeout_ms', b'--crpc_out', b'REFUSED'):
            self.assertIn(word, result.stdout)
        result = run([PLUGIN, '--version'])
        version = re.search(r'#define CRPC_VERSION "(.*)"', read(ROOT, 'crpc.h')).group(1)
        self.assertEqual(result.stdout.decode(), 'protoc-gen-crpc %s\n' % version)
        for arguments, data in ((['file.proto'], b''), ([], b''), ([], b'not a request')):
            result = run([PLUGIN] + arguments, data=data)
            self.assertEqual(result.returncode, 1)
            self.assertEqual(result.stdout, b'')
            self.assertIn(b'is started by protoc', result.stderr)

    def test_help_as_parameter(self):
        self.assertIn('idempotency_level', self.refused('--help'))


class WithoutProtoc(Case):
    """Requests that protoc never sends, but another front end may."""

    def respond(self, edit, proto):
        """Lets protoc read a file, changes its descriptor, asks the plugin."""
        from google.protobuf import descriptor_pb2
        from google.protobuf.compiler import plugin_pb2
        write(proto, self.path('t.proto'))
        run(['protoc', '--include_source_info', '-ot.pb', 't.proto'], self.dir)
        files = descriptor_pb2.FileDescriptorSet()
        with open(self.path('t.pb'), 'rb') as file:
            files.ParseFromString(file.read())
        edit(files.file[0])
        request = plugin_pb2.CodeGeneratorRequest(file_to_generate=['t.proto'],
                                                  proto_file=files.file)
        result = run([PLUGIN], self.dir, request.SerializeToString())
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return plugin_pb2.CodeGeneratorResponse.FromString(result.stdout)

    def test_equal_short_names(self):
        def rename(fdesc):
            fdesc.service[1].name = 'A'
        response = self.respond(rename, HEAD3 + 'message M {}\n'
                                'service A { rpc X(M) returns (M); }\n'
                                'service B { rpc Y(M) returns (M); }\n')
        self.assertIn('t.proto:5: service demo.A: the short name A is taken by line 4; rename one',
                      response.error)
        self.assertFalse(response.file)

    def test_no_source_info(self):
        def strip(fdesc):
            fdesc.ClearField('source_code_info')
        response = self.respond(strip, HEAD3 + 'message M { string a = 1; }\n' + ONE_METHOD)
        self.assertIn('\nt.proto: field demo.M.a: has no bound', response.error)

    def test_neighbours_are_not_imported(self):
        """The plugin may lie in a project's root, beside packages called proto and google."""
        write('raise RuntimeError("imported")\n', self.path('proto/__init__.py'))
        write('raise RuntimeError("imported")\n', self.path('google/__init__.py'))
        shutil.copy(PLUGIN, self.path('protoc-gen-crpc'))
        write(HEAD3 + 'message M {}\n' + ONE_METHOD, self.path('t.proto'))
        result = run(['protoc', '--plugin=./protoc-gen-crpc', '--crpc_out=.', 't.proto'], self.dir)
        self.assertEqual(result.returncode, 0, result.stderr.decode())

    def test_a_printing_nanopb_does_not_spoil_the_response(self):
        write(read('/usr/bin/nanopb_generator.py') + '\nprint("hello")\n',
              self.path('nanopb_generator.py'))
        os.environ['PYTHONPATH'] = self.dir
        try:
            response = self.respond(lambda fdesc: None, HEAD3 + 'message M {}\n' + ONE_METHOD)
        finally:
            del os.environ['PYTHONPATH']
        self.assertEqual(len(response.file), 2)


# ---------------------------------------------------------------------------------------------
# what the generated code does
# ---------------------------------------------------------------------------------------------

class Behaviour(Case):

    SOURCES = ['user.pb.c', 'user.crpc.c', 'common/types.pb.c', 'common/types.crpc.c',
               'common/deep.pb.c', 'google/protobuf/timestamp.pb.c', 'google/protobuf/empty.pb.c',
               os.path.join(HERE, 'behave.c')]

    def behave(self, *flags):
        self.generate(Generate.USER)
        program = self.build('behave', self.SOURCES, list(flags) + [
            '-fsanitize=address,undefined', '-fno-sanitize-recover', '-lprotobuf-nanopb'])
        result = run([program])
        self.assertEqual(result.returncode, 0, (result.stdout + result.stderr).decode())

    def test_all(self):
        self.behave()

    def test_client_only(self):
        self.behave('-DCRPC_ENABLE_SERVER=0')

    def test_server_only(self):
        self.behave('-DCRPC_ENABLE_CLIENT=0')


class RoundTrip(Case):
    """Views with the real crpc.h, against protoc's own encoder and decoder."""

    TEXT = ('name: "short" token: "a\\000b\\377" tags: "red" tags: "" '
            'tags: "a longer tag with spaces" '
            'inners { key: "first" parts: "p0" parts: "p1" number: 7 } '
            'inners { key: "second" parts: "p0" number: 7 } '
            'inners { key: "third" number: 7 } '
            'one { key: "in a oneof" parts: "p0" parts: "p1" number: 7 } '
            'labels { key: "left" value: 1 } labels { key: "right" value: -1 } '
            'present: "" large: "%s" last: 42' % ('x' * 100000))

    def setUp(self):
        super().setUp()
        self.generate(['views.proto'])
        write('#define CRPC_IMPLEMENTATION\n#include "crpc.h"\n', self.path('out/crpc.c'))
        sources = ['crpc.c', 'views.pb.c', 'views.crpc.c', os.path.join(HERE, 'roundtrip.c')]
        self.program = self.build('roundtrip', sources, [
            '-Wno-unused-function', '-DCRPC_ENABLE_ZOOKEEPER=0',
            '-fsanitize=address,undefined', '-fno-sanitize-recover', '-lprotobuf-nanopb',
            '-lpthread'])

    def protoc_codec(self, mode, data):
        result = run(['protoc', '-I' + PROTOS, '--%s=demo.Sample' % mode, 'views.proto'],
                     data=data)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result.stdout

    def decode(self, data, mode='decode'):
        result = run([self.program, mode], data=data)
        self.assertEqual(result.returncode, 0, result.stderr.decode())

    def test_encode(self):
        result = run([self.program, 'encode'])
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        self.assertEqual(self.protoc_codec('decode', result.stdout),
                         self.protoc_codec('decode', self.protoc_codec('encode',
                                                                       self.TEXT.encode())))
        self.decode(result.stdout)

    def test_decode(self):
        self.decode(self.protoc_codec('encode', self.TEXT.encode()))

    def test_decode_scattered(self):
        """Elements of a repeated field need not stand together: other fields may lie between."""
        parts = self.TEXT.split(' tags: ', 1)
        pieces = [self.protoc_codec('encode', text.encode()) for text in (
            'tags: "red" last: 1', parts[0] + ' tags: ""',
            'tags: "a longer tag with spaces" ' + parts[1].split('"a longer tag with spaces"')[1])]
        self.decode(b''.join(pieces))

    def test_decode_split_submessage(self):
        """Sample.token has the number of Inner.parts: it must not be taken for one of them."""
        pieces = [self.protoc_codec('encode', text) for text in (
            b'one { parts: "p0" }', b'token: "evil"', b'one { parts: "p1" }')]
        self.decode(b''.join(pieces), 'decode-split')


# ---------------------------------------------------------------------------------------------

def select(suite, words):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from select(item, words)
        elif not words or any(word in item.id() for word in words):
            yield item


def main(arguments):
    global KEEP, UPDATE
    KEEP = '--keep' in arguments
    UPDATE = '--update-golden' in arguments
    unknown = [a for a in arguments if a.startswith('-') and a not in ('--keep', '--update-golden')]
    if unknown:
        print(__doc__)
        return 2
    words = [a for a in arguments if not a.startswith('-')]
    every = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    tests = unittest.TestSuite(select(every, words))
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=1).run(tests)
    failed = len({test.id().split(' ')[0] for test, _ in result.failures + result.errors})
    for test, reason in result.skipped:
        print('skipped: %s: %s' % (test.id().split('.', 1)[1], reason))
    print('%d passed, %d failed' % (result.testsRun - failed - len(result.skipped), failed))
    return 1 if failed or not result.testsRun else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
